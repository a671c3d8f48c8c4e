"""Lets benches/steps.rs and benches/steps.py take turns, and appends their times to a file as JSON lines.

bench-turns.py FILE COMMAND [COMMAND]

Each command is a line for the shell, and talks as steps.rs says. The groups are those of the first command. A group is
measured for BENCH_ROUNDS rounds (default 9), in each of which each contender has a turn, and for no longer than half a
minute once there were three. BENCH_GROUPS is a regular expression for the names of the groups that are measured.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time

ROUNDS, LEAST, LONGEST = int(os.environ.get("BENCH_ROUNDS", "9")), 3, 30
GROUPS = re.compile(os.environ.get("BENCH_GROUPS", ""))


class Process:
    def __init__(self, command):
        self.command = command
        self.process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # The names of each group's contenders.
        self.groups = {}
        while line := self.read():
            line = json.loads(line)
            self.groups.setdefault(line["group"], []).append(line["name"])

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench-turns: error: '{self.command}' ended early")
        return line.strip()

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return self.read()

    def end(self):
        self.process.stdin.close()
        if self.process.wait():
            sys.exit(f"bench-turns: error: '{self.command}' failed")


def main():
    file, *commands = sys.argv[1:]
    processes = [Process(command) for command in commands]
    for group in filter(GROUPS.search, processes[0].groups):
        own = [process for process in processes if group in process.groups]
        begun, lines = time.monotonic(), []
        for round in range(ROUNDS):
            # The contenders are made anew, because where the system happens to place memory is worth a tenth of the time.
            for process in own:
                process.ask(f"group {group}")
            for process in own:
                for name in process.groups[group]:
                    lines.append({"group": group, "name": name, "round": round, "ns": int(process.ask(name))})
            if round + 1 >= LEAST and time.monotonic() - begun > LONGEST:
                break
        with open(file, "a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
        print(f"bench-turns: {group}: {round + 1} rounds in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    for process in processes:
        process.end()


if __name__ == "__main__":
    main()
