"""One round in a process of its own: a job as JSON on stdin, the outcome as the last line of stdout.

Usage: python -m bench.worker < job.json
"""

from __future__ import annotations

import sys

from mlxkd.runtime import preload_blas


def main(text: str) -> str:
    """Run the job with the runner of its kind."""
    preload_blas()
    from bench import runners
    from bench.runners._job import Job
    from mlxkd.registry import member

    job = Job.model_validate_json(text)
    outcome: str = member(runners, job.kind, kind="target kind").run(job).model_dump_json()
    return outcome


if __name__ == "__main__":
    from mlxkd.errors import UserError

    try:
        sys.stdout.write("\n" + main(sys.stdin.read()) + "\n")
    except UserError as error:
        sys.stderr.write(f"\n{error}\n")
        sys.exit(2)
