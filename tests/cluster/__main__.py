"""`python -m tests.cluster [--full]`: a cluster for trying things out, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.cluster import binaries
from tests.cluster.cluster import Cluster


def main() -> None:
    """Starts a cluster, says how to use it, and cleans up in the end."""
    arguments = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    arguments.add_argument("--full", action="store_true", help="real nodes, DNS and S3 instead of simulated GPU nodes")
    arguments.add_argument("--prometheus", action="store_true", help="with --full: a Prometheus that scrapes the pods")
    chosen = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with Cluster("full" if chosen.full else "simulated") as cluster:
            print(f"export KUBECONFIG={cluster.kubeconfig}")
            print(f"export PATH={binaries.folder()}:$PATH    # kubectl")
            if chosen.full:
                s3 = cluster.s3
                print(f"export AWS_ENDPOINT_URL={s3.outside}    # for pods: {s3.inside}")
                print(f"export AWS_ACCESS_KEY_ID={s3.access_key} AWS_SECRET_ACCESS_KEY={s3.secret_key}")
                print("export AWS_REGION=us-east-1")
                if chosen.prometheus:
                    print(f"# Prometheus: {cluster.start_prometheus()}")
            print(f"# logs: {cluster.sandbox.logs}\n# Ctrl-C ends the cluster and removes all of it", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except binaries.UnavailableError as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
