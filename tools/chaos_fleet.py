"""tools/chaos's processes: workers that a supervisor restarts and continues, armed with failpoints, and the learner."""

import json
import os
import pathlib
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time

from chaos_report import start_time

READY = re.compile(r"^lockstep-worker ready data=(\S+) control=(\S+)$")
FIRED = re.compile(r"failpoint (\S+?)=(\S+) at hit (\d+)")
# Passed many times in an update: by what the version's tensors give. The others once, or as traffic has it.
PER_CHUNK = ("weights.push.chunk", "weights.push.received")
PER_STREAM = ("weights.push.before", "weights.push.answer")
PER_TENSOR = ("weights.push.staged", "weights.install.slot", "weights.shadow.slot")
PER_BUCKET = ("weights.receive.bucket", "weights.receive.converted")
# Places that only one of the transports, or one of the worker's --weights_receive, comes to.
ONLY = {
    "stream": ("weights.push.",),
    "nccl": ("weights.join.", "weights.receive."),
    "staged": ("weights.install.slot",),
    "direct": ("weights.hold.", "weights.restore.", "weights.shadow."),
}
# Passed when a worker starts, before it is ready, as often as in an update: faults come after that.
AT_START = ("weights.shadow.",)
# Not in every update: armed from the start of every process, so that whatever comes first fires.
RARE = (
    "weights.commit.policy",
    "weights.commit.sample",
    "weights.rollback.before",
    "weights.rollback.answer",
    "weights.lease.expired",
    "weights.restore.before",
    "weights.restore.slot",
    "weights.restore.after",
    "control.pause.before",
    "control.pause.answer",
    "control.resume.before",
    "control.resume.answer",
    "keep.swap_out.before",
    "keep.swap_out.after",
    "keep.swap_in.before",
    "keep.swap_in.after",
)
# An error there ends the worker.
DEVICE = tuple(
    f"weights.{what}.{where}" for what in ("install", "restore", "shadow") for where in ("before", "slot", "after")
)


def failpoints(binary):
    """{name: whether it can return an error}: the worker's own list, which it gives when asked for one that is none."""
    result = subprocess.run(
        [binary, "--model", "none"], env={**os.environ, "LOCKSTEP_FAILPOINTS": "?=kill"}, capture_output=True, text=True
    )
    names = {m[1]: not m[2] for m in re.finditer(r"^  (\S+)( \(no error\))?$", result.stderr, re.M)}
    if result.returncode != 1 or not names:
        raise RuntimeError(f"{binary} gave no list of failpoints, exit status {result.returncode}:\n{result.stderr}")
    return names


def process_state(pid):
    """The letter in /proc/PID/stat, "" if there is no such process."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Coverage:
    """Which failpoints fired how often, and which to arm next: those with the fewest."""

    def __init__(self, names, rng, per_update):
        self.names, self.rng, self.per_update = names, rng, per_update
        self.lock = threading.Lock()
        self.fired = {name: {"kill": 0, "stop": 0, "sleep": 0, "error": 0} for name in names}
        self.pending = dict.fromkeys(names, 0)

    def count(self, name):
        return self.fired[name]["kill"] + self.fired[name]["stop"]

    def note(self, name, action):
        with self.lock:
            self.fired[name][action.split("(")[0].split("@")[0]] += 1

    def release(self, plan):
        with self.lock:
            for name in {entry.split("=")[0] for entry in plan}:
                self.pending[name] -= 1

    def plan(self):
        """The faults of one process's life: one to three in successive updates, the last of them its death."""
        with self.lock:
            order = sorted(self.names, key=lambda n: (self.count(n) + self.pending[n], self.rng.random()))
            common = [name for name in order if name not in RARE]
            entries, chosen = [], []
            first = self.rng.choice((0, 0, 1))  # updates that pass before the first fault
            life = self.rng.choice((1, 2, 2, 3))
            for update in range(life):
                name = common[update]
                action = "kill" if update == life - 1 else "stop"
                if self.rng.random() < 0.15:
                    action = f"sleep({self.rng.randrange(50, 600)})"
                    if self.names[name]:
                        action = self.rng.choice((action, "error(UNAVAILABLE)", "error(INTERNAL)"))
                chosen.append(name)
                entries.append(f"{name}={action}@{self.hit(name, first + update)}")
            for name in [n for n in order if n in RARE][:5]:
                chosen.append(name)
                entries.append(f"{name}={self.rng.choice(('kill', 'stop', 'stop'))}@{self.rng.choice((1, 1, 2))}")
            for name in chosen:
                self.pending[name] += 1
            return entries

    def hit(self, name, update):
        each = self.per_update.get(name, 1)
        update += name.startswith(AT_START)
        return update * each + self.rng.randrange(each) + 1


class Worker:
    """One place in the fleet: a process, its restarts and their addresses. A thread of its own watches over it."""

    def __init__(self, index, campaign):
        self.index, self.campaign = index, campaign
        self.rng = random.Random(f"{campaign.seed}/worker/{index}")
        self.lock = threading.Lock()
        self.generation = 0  # of the process: counts restarts
        self.process, self.log_path, self.plan = None, None, []
        self.data = self.control = None
        self.ready = threading.Event()
        self.read = 0  # of the log
        self.stopped_at = self.resume_at = None
        self.external = False  # killed or stopped by the campaign, not by a failpoint
        self.fatal = None  # the failpoint that fired and ends the process
        self.fatal_at = 0.0
        self.faults = 0  # fired or inflicted, all generations; sleeps are none
        self.held = []  # seconds for which it stopped, all generations
        self.last_seen = (0, (0, 0))  # generation, and the version it served after the last update
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self):
        self.fatal, self.external, self.stopped_at = None, False, None
        armed = self.campaign.faults and self.index in self.campaign.armed
        self.plan = self.campaign.coverage.plan() if armed else []
        ports = ("127.0.0.1:0", "127.0.0.1:0")
        if self.generation and self.rng.random() < 0.7:  # else the fleet's list changes
            ports = (self.data, self.control)
        for _ in range(2):
            log_path = self.campaign.scratch / f"worker{self.index}.{self.generation}.log"
            with self.lock:
                log_path.write_text("")
                self.log_path, self.read = log_path, 0
            command = [str(self.campaign.binary), "--model", str(self.campaign.versions.model), "--threads", "1"]
            command += ["--listen", ports[0], "--control_listen", ports[1], *self.campaign.worker_flags]
            environment = {**os.environ, "LOCKSTEP_FAILPOINTS": ";".join(self.plan)}
            with open(self.log_path, "a") as log:
                process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            self.campaign.pids[process.pid] = start_time(process.pid)
            match = READY.match(process.stdout.readline().rstrip("\n"))
            if match:
                break
            process.wait()
            text = self.log_path.read_text()
            if "cannot listen" not in text:
                raise RuntimeError(f"a worker did not start:\n{text}")
            ports = ("127.0.0.1:0", "127.0.0.1:0")  # somebody took the port
        else:
            raise RuntimeError(f"no port for a worker:\n{text}")
        with self.lock:
            self.process = process
            self.data, self.control = match.groups()
            self.generation += 1
        self.ready.set()

    def snapshot(self):
        """(generation, data, control) of the process that runs, None while there is none."""
        with self.lock:
            return (self.generation, self.data, self.control) if self.ready.is_set() else None

    def scan_log(self):
        """Counts the faults that the process has logged since the last call. By any thread."""
        with self.lock:
            with open(self.log_path) as log:
                log.seek(self.read)
                text = log.read()
                whole = text.rpartition("\n")[0]
                self.read += len(whole) + (1 if whole else 0)
            self.count_faults(whole)

    def count_faults(self, whole):
        for name, action, _ in FIRED.findall(whole):
            if action.startswith("kill") or (name in DEVICE and action.startswith("error")):
                self.fatal, self.fatal_at = (name, action), time.monotonic()
            self.faults += not action.startswith("sleep")
            self.campaign.coverage.note(name, action)
            self.campaign.event("failpoint", worker=self.index, name=name, action=action, generation=self.generation)

    def inflict(self, sig):
        """A fault from outside, at no failpoint."""
        with self.lock:
            if self.ready.is_set() and self.process.poll() is None:
                self.external, self.faults = True, self.faults + 1
                self.campaign.event("external", worker=self.index, action=sig.name, generation=self.generation)
                self.process.send_signal(sig)

    def watch(self):
        try:
            while not self.campaign.over.is_set():
                self.look()
                time.sleep(0.02)
        except Exception as error:
            self.campaign.violation("supervision", f"worker {self.index}: {type(error).__name__}: {error}")

    def look(self):
        status = self.process.poll()
        self.scan_log()
        now = time.monotonic()
        if status is not None:
            self.ready.clear()
            self.scan_log()
            if not self.external and self.fatal is None:
                tail = self.log_path.read_text()[-2000:]
                self.campaign.violation("death", f"worker {self.index} ended by itself, status {status}:\n{tail}")
            self.campaign.coverage.release(self.plan)
            if self.plan:
                self.campaign.pass_on(self.index)
            self.process.stdout.close()
            time.sleep(self.rng.choice((0.0, 0.05, 0.3)))
            if self.campaign.over.is_set():
                return
            self.start()
            self.campaign.event("restarted", worker=self.index, generation=self.generation)
        elif self.fatal and self.stopped_at is None and now > self.fatal_at + 10:
            self.campaign.violation("death", f"worker {self.index} goes on 10 s after {'='.join(self.fatal)}")
            self.process.kill()
        elif process_state(self.process.pid) == "T":
            if self.stopped_at is None:
                self.stopped_at = now
                self.held.append(self.campaign.hold(self.rng))
                self.resume_at = now + self.held[-1]
            elif now >= self.resume_at:
                self.stopped_at, self.fatal_at = None, now
                self.process.send_signal(signal.SIGCONT)
                self.campaign.event("continued", worker=self.index, generation=self.generation)
                time.sleep(0.02)

    def serving(self):
        return (
            self.ready.is_set()
            and self.process.poll() is None
            and process_state(self.process.pid) not in ("T", "Z", "")
        )

    def end(self):
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                self.process.kill()
            self.process.wait()
            self.process.stdout.close()


class Learner:
    """The learner process: restarted when it dies, continued when it stops."""

    def __init__(self, campaign):
        self.campaign = campaign
        self.rng = random.Random(f"{campaign.seed}/learner")
        self.process, self.lines = None, None

    def start(self):
        script = pathlib.Path(__file__).with_name("chaos_learner.py")
        with open(self.campaign.scratch / "learner.log", "a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(script),
                    str(self.campaign.seed),
                    self.campaign.transport,
                    self.campaign.nccl_library,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.campaign.pids[self.process.pid] = start_time(self.process.pid)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, args=(self.process, self.lines), daemon=True).start()
        self.wait_for("ready", 60)

    @staticmethod
    def read(process, lines):
        for line in process.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    def send(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def wait_for(self, name, limit):
        """The event of that name; None if the learner died. Also returns how long it stood still, seconds."""
        deadline, stopped, resume_at = time.monotonic() + limit, None, 0.0
        while True:
            try:
                event = self.lines.get(timeout=0.05)
            except queue.Empty:
                now = time.monotonic()
                if process_state(self.process.pid) == "T":
                    if stopped is None:
                        stopped, resume_at = now, now + self.campaign.hold(self.rng)
                        deadline = max(deadline, resume_at + limit)
                    elif now >= resume_at:
                        stopped = None
                        self.process.send_signal(signal.SIGCONT)
                if now > deadline:
                    self.campaign.violation("deadline", f"the learner did not say {name!r} within {limit:.1f} s")
                    self.kill()
                    return None
                continue
            if event is None:
                self.process.wait()
                return None
            if event["event"] == "fault":
                self.campaign.learner_fault(event)
            elif event["event"] == name:
                return event

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()

    def end(self):
        if self.process is not None:
            self.kill()
            self.process.stdin.close()
            self.process.stdout.close()
