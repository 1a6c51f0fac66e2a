"""Writes docs/environment.md and the generated blocks of the other pages.

    python docs/generate.py            write the pages
    python docs/generate.py --check    exit 1 if a page is out of date

The modules of this folder produce the blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from docs import results, speed, telemetry
from docs.environment import environment_page
from docs.error_examples import error_examples
from docs.findings import cited_findings, with_cited_tests
from docs.page import COMMAND, ROOT, with_generated


def pages() -> dict[Path, str]:
    """Return the expected text of each page by its path."""
    telemetry_page, reading = ROOT / "docs/telemetry.md", ROOT / "docs/reading.md"
    telemetry_blocks = telemetry.blocks() | {
        "cost": speed.telemetry_cost(results.read("agent")),
        "report": speed.report_cost(results.read("report")),
    }
    failures = telemetry.failures(json.loads((ROOT / "docs/reading/failures.json").read_text()))
    extending, findings = ROOT / "docs/extending.md", ROOT / "docs/dev/findings.md"
    return {
        ROOT / "docs/environment.md": environment_page(),
        extending: with_generated(extending.read_text(), "errors", error_examples()),
        **{page: with_blocks(page.read_text(), blocks) for page, blocks in measured().items()},
        telemetry_page: with_blocks(telemetry_page.read_text(), telemetry_blocks),
        reading: with_generated(reading.read_text(), "failures", failures),
        findings: with_cited_tests(findings.read_text(), cited_findings(ROOT / "tests")),
    }


def measured() -> dict[Path, dict[str, str]]:
    """Return the tables of measurements by page and name of the block."""
    learning, throughput = results.read("learning-digits"), results.read("throughput")
    peers, cifar = results.read("throughput-peers"), results.read("throughput-cifar10")
    agent, training = results.read("agent"), results.read("training-time")
    adaptivity = {env_id: results.read(name) for env_id, name in results.ADAPTIVITY.items()}
    ablations = {env_id: results.read(name) for env_id, name in results.ABLATIONS.items()}
    overview = results.adaptivity_table(adaptivity, ablations)
    sizing, contexts, digits = map(results.adaptivity_arms, adaptivity.values())
    return {
        ROOT / "README.md": {
            "training-time": speed.short_training_time(training),
            "adaptivity": overview,
            "results": results.headline(learning, is_short=True),
            "speed": speed.short_throughput(throughput),
        },
        ROOT / "docs/speed.md": {
            "throughput": speed.throughput(throughput),
            "cifar": speed.throughput(cifar),
            "training time": speed.training_time(training),
            "agent": speed.agent(agent),
            "compiled": speed.compiled(agent),
            "peers": speed.peers(peers),
            "profile": speed.profile(results.read("profile")),
            "cifar training": speed.cifar_training(results.read("cifar10-training")),
        },
        ROOT / "docs/dev/experiments.md": {
            "targets": speed.targets(throughput, peers, cifar, agent),
        },
        ROOT / "docs/results.md": {
            "adaptivity": overview,
            "sizing": sizing,
            "contexts": contexts,
            "plans": results.plan_table(adaptivity["Esper-Digits-Contexts-v0"]),
        },
        ROOT / "docs/results-digits.md": {
            "adaptivity-digits": digits,
            "arms": results.headline(learning),
            "policy": results.policy_table(learning),
            "ablations": results.ablation_table(results.read("ablations")),
            "ablations-full": results.ablation_table(results.read("ablations-full")),
            "search": results.search_table(learning),
        },
    }


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """Replace the content of each generated block."""
    for name, content in blocks.items():
        text = with_generated(text, name, content)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or report those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a page is out of date"
    )
    is_check = parser.parse_args(arguments).check
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not is_check:
            path.write_text(text)
    if is_check and stale:
        print(f"out of date: {', '.join(stale)}; run: {COMMAND}", file=sys.stderr)
        return 1
    print(f"{'written' if stale else 'up to date'}: {', '.join(stale) or 'all pages'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
