"""A real Kubernetes on this machine for the tests and for `make cluster`.

Everything runs in network, pid and mount namespaces of its own: nothing of it is visible outside, and ending one
process ends it all. The binaries are built from pinned Go modules (`modules/`) into a cache that all clones share.

    with Cluster() as cluster:                 # control plane and simulated GPU nodes, ready in seconds
    with Cluster(profile="full") as cluster:   # two kubelets with containers, DNS, S3
"""
