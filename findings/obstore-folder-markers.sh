#!/bin/sh
# obstore (object_store) and names that S3 allows: a folder marker "m/sub/" is listed as the path "m/sub", which can
# neither be read nor deleted; and one key with an empty part ("d/a//b") makes the whole listing of d/ fail.
# Needs: pip, go, a free port on the loopback interface.
set -eu
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q obstore==0.12.1 boto3==1.44.5
mkdir server
cat > server/main.go <<'END'
package main

import (
	"fmt"
	"net"
	"net/http"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr())
	panic(http.Serve(listener, gofakes3.New(s3mem.New(), gofakes3.WithAutoBucket(true)).Server()))
}
END
(cd server && go mod init server && go get github.com/johannesboyne/gofakes3@v1.2.0 && go mod tidy && go build -o ../s3) \
  > build.log 2>&1 || { cat build.log; exit 1; }
mkfifo address
./s3 > address &
server=$!
read -r address < address
AWS_ENDPOINT_URL="http://$address" AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret venv/bin/python - <<'END'
import os

import boto3
import obstore
from obstore.store import S3Store

print("obstore", obstore.__version__)
address = os.environ["AWS_ENDPOINT_URL"]
keys = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
for key in ("m/sub/", "m/file", "d/a//b", "d/c"):
    keys.put_object(Bucket="team", Key=key, Body=b"")


def store(prefix):
    config = {"endpoint": address, "region": "us-east-1", "virtual_hosted_style_request": False}
    return S3Store("team", prefix=prefix, config=config, client_options={"allow_http": True})


listed = [meta["path"] for chunk in obstore.list(store("m")) for meta in chunk]
print("keys m/sub/ and m/file are listed as", listed)
assert listed == ["file", "sub"]
try:
    obstore.head(store("m"), "sub")
    raise SystemExit("the behaviour has changed: the marker can be read")
except FileNotFoundError:
    print("head of sub: not found")
obstore.delete(store("m"), "sub/")
left = [found["Key"] for found in keys.list_objects_v2(Bucket="team", Prefix="m/")["Contents"]]
print("after delete of sub/:", left)
assert "m/sub/" in left
try:
    list(obstore.list(store("d")))
    raise SystemExit("the behaviour has changed: a key with an empty part is listed")
except Exception as error:
    print("list of d/, with the keys d/a//b and d/c:", type(error).__name__, str(error).splitlines()[0])
    assert "empty path segment" in str(error)
END
