"""The recipes in codes/clusters: shells can read them, and shards are numbered alike wherever one says how many."""

import re

import pytest
from children import run
from conftest import CODES

CLUSTERS = CODES / "clusters"


@pytest.mark.parametrize("recipe", sorted(path.name for path in CLUSTERS.glob("*.sh")))
def test_a_shell_can_read_it(recipe):
    result = run(["bash", "-n", CLUSTERS / recipe])
    assert (result.returncode, result.stderr) == (0, "")


def test_the_pods_are_the_shards_of_one_run():
    text = (CLUSTERS / "kubernetes_shards.yaml").read_text()
    (command,) = re.findall(r"exec python (.*?)\n +resources:", text, re.DOTALL)
    shards = [
        run(["sh", "-c", f"echo {' '.join(command.split())}"], env={"JOB_COMPLETION_INDEX": str(pod)}).stdout.split()[
            -1
        ]
        for pod in range(int(re.search(r"completions: (\d+)", text)[1]))
    ]
    assert shards == [f"{k}/8" for k in range(1, 9)]
    assert re.search(r"action: FailJob.*\n.*containerName: certify, operator: In, values: \[2\]", text)
    assert re.search(r"action: Ignore.*\n.*containerName: certify, operator: In, values: \[75\]", text)
