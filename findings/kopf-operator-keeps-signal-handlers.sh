#!/bin/sh
# kopf.operator(), embedded in a program's own event loop: it takes SIGTERM and SIGINT over and does not give them back.
# After it has returned (its stop_flag was set), the program can be ended by neither: the first signal is lost without a
# word, each further one is an InvalidStateError. Whoever starts it again, or goes on without it, has to set handlers of
# their own. Needs Python and pip, and no cluster; fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > embed.py <<'END'
import asyncio
import os
import signal

import kopf


async def main():
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**_):
        return kopf.ConnectionInfo(server="http://127.0.0.1:9")

    stop, ready = asyncio.Event(), asyncio.Event()
    options = {"registry": registry, "standalone": True, "clusterwide": True}
    operator = asyncio.create_task(kopf.operator(**options, stop_flag=stop, ready_flag=ready))
    await ready.wait()
    stop.set()
    await operator
    print("kopf.operator() has returned", flush=True)
    for which in ("first", "second"):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.5)
        print(f"still there after the {which} SIGTERM", flush=True)


asyncio.run(main())
END
python3 -m venv venv
venv/bin/pip install --disable-pip-version-check -q kopf==1.45.2
echo "kopf 1.45.2; expected: the process ends by the first SIGTERM"
venv/bin/python embed.py > seen 2> log
cat seen
# Seen: "still there" after both; in the log, InvalidStateError for the second.
grep -q "still there after the second SIGTERM" seen
grep -q InvalidStateError log
