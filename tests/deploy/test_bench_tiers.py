"""`headrace bench tiers`: which trace is played, and what is said of it."""

import json
from pathlib import Path

import pytest

from headrace.deploy import cli
from headrace.deploy.bench import tiers
from headrace.deploy.bench.machine import Machine
from headrace.serving.errors import InvalidRequest

MACHINE = Machine(
    cpu="a CPU",
    cores=2,
    flags=["avx2"],
    memory_gb=24,
    kernel="6.1",
    python="3.11",
    read_gb_s={"1": 30.0},
    int8_gop_s=None,
    load_average=0.1,
    others_cores=0.0,
)
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,99999,0
"""


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """The public traces' shape, with a few lines of our own."""
    (tmp_path / tiers.CONVERSATION).parent.mkdir(parents=True)
    (tmp_path / tiers.CONVERSATION).write_text(TRACE)
    clients = tmp_path / tiers.SERVEGEN
    clients.mkdir(parents=True)
    (clients / "chunk-0-trace.csv").write_text("0,0.5,1\n600,1.5,1\n")
    (clients / "chunk-1-trace.csv").write_text("0,3,1\n600,3,1\n")
    return tmp_path


def test_arrivals_are_those_of_the_trace(traces: Path) -> None:
    """A length beyond the engine's context is cut, and an empty answer has a token."""
    arrivals = tiers.read_conversation(traces / tiers.CONVERSATION, 10)

    assert [round(each.at_ms, 1) for each in arrivals] == [0.0, 4314.6, 4541.9]
    assert [(each.prompt_tokens, each.answer_tokens) for each in arrivals] == [
        (374, 44),
        (396, 109),
        (8192, 1),
    ]


def test_tenants_have_the_rates_of_the_largest_clients(traces: Path) -> None:
    assert tiers.client_rates(traces / tiers.SERVEGEN) == [0.75, 0.25]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", TRACE.replace("374", "many")])
def test_another_file_is_refused_as_a_trace(traces: Path, content: str) -> None:
    (traces / tiers.CONVERSATION).write_text(content)

    with pytest.raises(InvalidRequest, match="cannot be read as a trace"):
        tiers.read_conversation(traces / tiers.CONVERSATION, 10)


def test_a_folder_without_clients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        tiers.client_rates(tmp_path)


def test_each_policy_has_its_figures_and_ours_the_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiers.machine, "measure", lambda: MACHINE)
    monkeypatch.setattr(tiers, "found_traces", lambda: None)

    arguments = ["bench", "tiers", "--requests", "150", "--home", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0

    result = json.loads(capsys.readouterr().out)
    figures = {(row["peer"], row["metric"]): row["value"] for row in result["rows"]}
    assert {peer for peer, _ in figures} == {"headrace", "fcfs", "strict-priority"}
    assert figures["headrace", "over fcfs_ratio"] == pytest.approx(
        figures["headrace", "goodput_share"] / figures["fcfs", "goodput_share"]
    )
    assert (
        figures["headrace", "fairness gap_tokens"] <= figures["headrace", "fairness bound_tokens"]
    )
    assert "synthetic" in result["notes"][0]
    assert "not measured" in result["notes"][1]


def test_a_load_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tiers", "--load", "0"]) == 3
    assert "--load is 0" in capsys.readouterr().err
