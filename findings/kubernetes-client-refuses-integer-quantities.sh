#!/bin/sh
# The Python client of Kubernetes 37: its typed calls validate a body that is a plain dictionary, too, by their own models,
# and refuse what the API server accepts: a quantity that is a number (cpu: 4, as it stands in most manifests), and every
# field that is newer than the client. Client 34 sent a dictionary as it was; CustomObjectsApi still does so. Needs
# Python and pip, and no cluster; fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > create.py <<'END'
from kubernetes import client

configuration = client.Configuration()
configuration.host, configuration.retries = "http://127.0.0.1:9", False
api = client.ApiClient(configuration)
container = {"name": "main", "image": "registry.example.com/main", "resources": {"limits": {"cpu": 4}}}
spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}, "spec": spec}
for call in (
    lambda: client.BatchV1Api(api).create_namespaced_job("default", job),
    lambda: client.CustomObjectsApi(api).create_namespaced_custom_object("batch", "v1", "default", "jobs", job),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, "|", " ".join(str(error).split())[:160])
END
python3 -m venv venv
for version in 34.1.0 37.0.0; do
  venv/bin/pip install --disable-pip-version-check -q "kubernetes==$version"
  echo "kubernetes $version; expected twice: no connection"
  venv/bin/python create.py 2>/dev/null | tee "seen-$version"
done
# Seen with 37.0.0: ValidationError for the typed call, no connection for the other.
grep -q "^NewConnectionError" seen-34.1.0
! grep -q ValidationError seen-34.1.0
grep -q "^ValidationError.*cpu" seen-37.0.0
