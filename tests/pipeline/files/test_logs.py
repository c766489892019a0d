import re
import subprocess
import sys


def test_each_line_names_its_run_even_if_runs_share_a_process() -> None:
    code = (
        "import logging\n"
        "from pipeline.files.logs import run_log\n"
        "logging.basicConfig(level=logging.INFO)\n"  # others' handlers must not repeat it
        "for run in ('aaaa1111', 'bbbb2222'):\n"
        "    run_log(run).info('write: %d rows', 32)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    found = [re.fullmatch(r"[\d-]+ [\d:,]+ run (\w+) write: 32 rows", line) for line in said.splitlines()]
    assert [match and match[1] for match in found] == ["aaaa1111", "bbbb2222"]
