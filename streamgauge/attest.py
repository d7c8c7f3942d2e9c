"""What an audit found as an in-toto statement, about the very files that were audited.

Source: in-toto attestation framework, Statement v1 and the predicate test-result v0.1.
"""

import hashlib
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.checkpoints.hashes import digests_of, together
from streamgauge.errors import RecordError

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
FAILED, WARNED = ("fail", "error"), ("unusual", "known_failure")


def statement(checkpoint: Checkpoint, rows: Path) -> dict[str, Any]:
    """The statement on a checkpoint's weight files, from the rows.jsonl of its audit.

    Raises RecordError where the rows are none, or about other weights than these, or about several.
    """
    try:
        content = rows.read_bytes()
        found = [json.loads(line) for line in content.decode().splitlines()]
        hashes = {row["weights_sha256"] for row in found}
        outcomes = Counter(row["outcome"] for row in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{rows} is not the rows.jsonl of an audit ({type(error).__name__})."
        ) from error
    digests = digests_of(checkpoint.own_files)
    if hashes != {together(digests)}:
        raise RecordError(
            f"{rows} is not about the weights in {checkpoint.folder}, or not about these alone; "
            "audit them, and name its rows.jsonl."
        )

    def laws(*wanted: str) -> list[str]:
        return [row["law"] for row in found if row["outcome"] in wanted]

    failed, warned = laws(*FAILED), laws(*WARNED)
    result = "FAILED" if failed or not outcomes["pass"] else "WARNED" if warned else "PASSED"
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": one}} for name, one in digests.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "result": result,
            "configuration": [
                {"name": "streamgauge", "uri": f"pkg:pypi/streamgauge@{version('streamgauge')}"},
                {"name": rows.name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}},
            ],
            "passedTests": laws("pass"),
            "warnedTests": warned,
            "failedTests": failed,
        },
    }
