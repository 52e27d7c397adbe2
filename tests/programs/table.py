"""The programs, by the commands with which people start them.

Each listens on a Unix socket or on loopback, unless it is `public`, and keeps its data in a folder that the session removes.
"""

from __future__ import annotations

from tests.programs.program import Program

FRESH_LIMITS = (
    "PAM gives what sudo and su start fresh limits, and with them the mark is gone; it has left the session and lost its "
    "parent as well"
)

# In a process of its own: in that of a task neither method can import Airflow again, whose database the runner hides.
POOL = """
cat > pool.py <<EOF
import multiprocessing, pathlib, time

def work(number):
    pathlib.Path(f"there{number}").touch()
    time.sleep(600)

if __name__ == "__main__":
    with multiprocessing.get_context("METHOD").Pool(2) as pool:
        pool.map(work, range(2), chunksize=1)
EOF
"$PYTHON" pool.py &
await test -e there0 -a -e there1
"""

DAEMONS = (
    Program(
        "redis-server, as a daemon",
        """
redis-server --daemonize yes --port 0 --unixsocket "$DATA/redis" --dir "$DATA" --save ''
await redis-cli -s "$DATA/redis" ping
""",
        needs=("redis-server", "redis-cli"),
    ),
    Program(
        "PostgreSQL, by pg_ctl",
        """
[ "$(id -u)" != 0 ] || chown postgres .
as_user postgres initdb --pgdata=pg --auth=trust --no-sync
as_user postgres pg_ctl --wait --pgdata=pg --log=pg.log \\
    --options="-c listen_addresses= -c unix_socket_directories=$DATA" start
""",
        needs=("initdb", "pg_ctl", "setpriv"),
    ),
    Program(
        "nginx",
        """
cat > nginx.conf <<EOF
pid $DATA/pid;
error_log $DATA/error.log;
worker_processes 2;
events {}
http {
    access_log off;
    client_body_temp_path $DATA/body;
    proxy_temp_path $DATA/proxy;
    fastcgi_temp_path $DATA/fastcgi;
    uwsgi_temp_path $DATA/uwsgi;
    scgi_temp_path $DATA/scgi;
    server { listen unix:$DATA/nginx; }
}
EOF
nginx -p "$DATA" -c "$DATA/nginx.conf" -e "$DATA/error.log"
await test -s pid
""",
        needs=("nginx",),
    ),
    Program(
        "ssh with ControlPersist",
        """
mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f key
cp key.pub authorized
cat > sshd.conf <<EOF
ListenAddress 127.0.0.1
Port $PORT
HostKey $DATA/key
AuthorizedKeysFile $DATA/authorized
StrictModes no
UsePAM no
PidFile $DATA/pid
EOF
"$(command -v sshd)" -f "$DATA/sshd.conf" -E "$DATA/sshd.log"
await test -s pid
ssh -F none -i key -p "$PORT" -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \\
    -o ControlMaster=auto -o ControlPersist=600 -o ControlPath="$DATA/master" 127.0.0.1 true
test -S master
""",
        needs=("ssh", "sshd", "ssh-keygen"),
        root=True,
    ),
    Program(
        "gpg, which starts gpg-agent",
        """
chmod 700 .
gpg --homedir "$DATA" --batch --passphrase '' --quick-generate-key somebody future-default default never
gpg-connect-agent --homedir "$DATA" --no-autostart /bye
""",
        needs=("gpg", "gpg-agent", "gpg-connect-agent"),
    ),
    Program(
        "dbus-daemon",
        'dbus-daemon --session --fork --address="unix:path=$DATA/bus" && test -S bus',
        needs=("dbus-daemon",),
    ),
    Program(
        "PulseAudio",
        """
export XDG_RUNTIME_DIR="$DATA" PULSE_RUNTIME_PATH="$DATA/pulse" DBUS_SESSION_BUS_ADDRESS=unix:path=/none
pulseaudio -n --daemonize=yes --exit-idle-time=-1 --load=module-null-sink
pulseaudio --check
""",
        needs=("pulseaudio",),
    ),
    Program(
        "start-stop-daemon",
        """
start-stop-daemon --start --background --make-pidfile --pidfile "$DATA/pid" --exec "$(command -v sleep)" -- 600
await test -s pid
""",
        needs=("start-stop-daemon",),
    ),
    Program(
        "nohup … &", "(nohup sh -c 'touch there; sleep 600; :' &)\nawait test -e there", needs=("nohup",)
    ),
    Program(
        "setsid --fork",
        "setsid --fork sh -c 'touch there; sleep 600; :'\nawait test -e there",
        needs=("setsid",),
    ),
    Program(
        "Chromium, headless",
        """
chromium --headless --no-sandbox --disable-gpu --user-data-dir="$DATA/profile" --remote-debugging-port="$PORT" \\
    about:blank &
await bash -c "exec 3<> /dev/tcp/127.0.0.1/$PORT"
""",
        needs=("chromium",),
    ),
)
TERMINALS = (
    Program(
        "tmux",
        """
tmux -S "$DATA/tmux" new-session -d 'touch there; sleep 600 | sleep 600'
await test -e there
""",
        needs=("tmux",),
    ),
    Program(
        "screen",
        """
mkdir -m 700 screens
SCREENDIR="$DATA/screens" screen -d -m sh -c 'touch there; sleep 600 | sleep 600'
await test -e there
""",
        needs=("screen",),
    ),
    Program(
        "script",
        """
script --quiet --command 'touch there; sleep 600; :' typescript &
await test -e there
""",
        needs=("script",),
    ),
)
BUILDS = (
    Program(
        "make -j",
        r"""
printf 'all: a b c\na b c:\n\ttouch $@ && sleep 600\n' > Makefile
make -j 3 &
await test -e a -a -e b -a -e c
""",
        needs=("make",),
    ),
    Program(
        "GNU parallel",
        """
parallel --will-cite --jobs 3 'touch {}; sleep 600; :' ::: a b c &
await test -e a -a -e b -a -e c
""",
        needs=("parallel",),
    ),
    Program(
        "xargs -P",
        """
printf 'a b c' | xargs -n 1 -P 3 sh -c 'touch "$0"; sleep 600; :' &
await test -e a -a -e b -a -e c
""",
        needs=("xargs",),
    ),
    Program(
        "timeout",
        """
timeout 600 sh -c 'touch there; sleep 600; :' &
await test -e there
""",
        needs=("timeout",),
    ),
    Program(
        "strace -f",
        """
strace --follow-forks --output=trace sh -c 'touch there; sleep 600; :' &
await test -e there
""",
        needs=("strace",),
    ),
)
SANDBOXES = (
    Program(
        "unshare --pid",
        """
unshare --pid --fork --mount-proc sh -c 'touch there; sleep 600; :' &
await test -e there
""",
        needs=("unshare",),
        root=True,
    ),
    Program(
        "bwrap",
        """
bwrap --dev-bind / / --unshare-pid --proc /proc sh -c 'touch there; sleep 600; :' &
await test -e there
""",
        needs=("bwrap",),
    ),
)
USERS = (
    Program(
        "sudo",
        """
sudo -n sh -c 'touch there; sleep 600; :' &
await test -e there
""",
        needs=("sudo",),
        root=True,
        stays={"sudo": FRESH_LIMITS, "sh": FRESH_LIMITS, "sleep": FRESH_LIMITS},
        stays_after=("fails",),
    ),
    Program(
        "sudo, a daemon",
        """
sudo -n setsid --fork sh -c 'touch there; sleep 600; :'
await test -e there
""",
        needs=("sudo", "setsid"),
        root=True,
        stays={"sh": FRESH_LIMITS, "sleep": FRESH_LIMITS},
    ),
    Program(
        "su",
        """
chmod 777 .
su nobody -s /bin/sh -c 'touch there; sleep 600; :' &
await test -e there
""",
        needs=("su",),
        root=True,
        stays={"su": FRESH_LIMITS, "sh": FRESH_LIMITS, "sleep": FRESH_LIMITS},
        stays_after=("fails",),
    ),
    Program(
        "su, a daemon",
        """
chmod 777 .
su nobody -s /bin/sh -c "setsid --fork sh -c 'touch there; sleep 600; :'"
await test -e there
""",
        needs=("su", "setsid"),
        root=True,
        stays={"sh": FRESH_LIMITS, "sleep": FRESH_LIMITS},
    ),
)
RUNTIMES = (
    Program(
        "a JVM with a child",
        """
cat > Wait.java <<EOF
class Wait {
    public static void main(String[] arguments) throws Exception {
        new ProcessBuilder("sleep", "600").start();
        new java.io.File("there").createNewFile();
        Thread.sleep(600_000);
    }
}
EOF
java Wait.java &
await test -e there
""",
        needs=("java", "javac"),
    ),
    Program(
        "Node's cluster",
        """
cat > cluster.js <<EOF
const cluster = require("cluster");
if (cluster.isPrimary) { cluster.fork(); cluster.fork(); }
else require("net").createServer().listen("$DATA/node", () => require("fs").writeFileSync("there" + process.pid, ""));
EOF
node cluster.js &
await eval '[ "$(ls there* | wc -l)" = 2 ]'
""",
        needs=("node",),
    ),
)
PYTHON = (
    Program("multiprocessing, fork", task="pool"),
    *(
        Program(f"multiprocessing, {method}", POOL.replace("METHOD", method))
        for method in ("spawn", "forkserver")
    ),
    Program(
        "joblib",
        """
cat > jobs.py <<EOF
import pathlib, time
from joblib import Parallel, delayed

def work(number):
    pathlib.Path(f"there{number}").touch()
    time.sleep(600)

Parallel(n_jobs=2)(delayed(work)(number) for number in range(2))
EOF
"$PYTHON" jobs.py &
await test -e there0 -a -e there1
""",
        packages=("joblib",),
    ),
    Program(
        "Dask's LocalCluster",
        """
cat > cluster.py <<EOF
import pathlib, time
from dask.distributed import Client, LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, host="127.0.0.1", dashboard_address=None) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        pathlib.Path("there").touch()
        time.sleep(600)
EOF
"$PYTHON" cluster.py &
await test -e there
""",
        packages=("distributed",),
    ),
    Program(
        "gunicorn --daemon",
        """
cat > web.py <<EOF
import os, pathlib

def app(environ, start_response):
    start_response("200 OK", [])
    return []

pathlib.Path(f"there{os.getpid()}").touch()
EOF
"$PYTHON" -m gunicorn --daemon --workers 2 --bind "unix:$DATA/web" --chdir "$DATA" web:app
await eval '[ "$(ls there* | wc -l)" = 2 ]'
""",
        packages=("gunicorn",),
    ),
    Program(
        "a Celery worker, --detach",
        """
cat > jobs.py <<EOF
import pathlib
from celery import Celery, signals

app = Celery(broker="memory://")

@signals.worker_ready.connect
def tell(**_):
    pathlib.Path("there").touch()
EOF
"$PYTHON" -m celery --app jobs worker --detach --concurrency 2 --pidfile "$DATA/pid" --logfile "$DATA/worker.log"
await test -e there
""",
        packages=("celery",),
    ),
    Program(
        "papermill",
        """
cat > in.ipynb <<EOF
{"cells": [{"cell_type": "code", "execution_count": null, "id": "wait", "metadata": {}, "outputs": [], "source": [
"import pathlib, subprocess\\n", "pathlib.Path('there').touch()\\n", "subprocess.run(['sleep', '600'])"]}],
"metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
"nbformat": 4, "nbformat_minor": 5}
EOF
"$PYTHON" -m papermill --no-progress-bar in.ipynb out.ipynb &
await test -e there
""",
        packages=("papermill", "ipykernel"),
    ),
    Program(
        "Ray",
        """
RAY_DISABLE_IMPORT_WARNING=1 "$PYTHON" -m ray.scripts.scripts start --head --node-ip-address=127.0.0.1 --port="$PORT" \\
    --include-dashboard=false --disable-usage-stats --num-cpus=2 --object-store-memory=100000000 --temp-dir="$DATA/ray"
""",
        packages=("ray",),
        large=True,
        public=True,
    ),
    Program(
        "dbt",
        """
mkdir models
cat > dbt_project.yml <<EOF
name: shop
version: "1.0"
profile: shop
EOF
cat > profiles.yml <<EOF
shop: {target: dev, outputs: {dev: {type: duckdb, path: shop.duckdb, threads: 1, settings: {threads: 1}}}}
EOF
echo "select count(*) as n from range(1000000000) a, range(1000000000) b where a.range * b.range % 7 = 3" > models/slow.sql
DO_NOT_TRACK=1 "$PYTHON" -m dbt.cli.main run --profiles-dir . --log-path logs &
await grep -q 'START sql' logs/dbt.log
""",
        packages=("dbt-core", "dbt-duckdb"),
        large=True,
    ),
    Program(
        "PySpark",
        """
cat > spark.py <<EOF
import pathlib, time
from pyspark.sql import SparkSession

def work(number):
    pathlib.Path(f"$DATA/there{number}").touch()
    time.sleep(600)

session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False) \\\\
    .config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
session.sparkContext.parallelize(range(2), 2).foreach(work)
EOF
SPARK_LOCAL_IP=127.0.0.1 PYSPARK_PYTHON="$PYTHON" "$PYTHON" spark.py &
await test -e there0 -a -e there1
""",
        needs=("java",),
        packages=("pyspark",),
        large=True,
    ),
)

PROGRAMS = (*DAEMONS, *TERMINALS, *BUILDS, *SANDBOXES, *USERS, *RUNTIMES, *PYTHON)
