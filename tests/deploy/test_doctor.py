"""`headrace doctor`: it says what is wrong and what to do, and changes nothing."""

import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headrace.deploy import checkup, cli
from headrace.deploy.checkup import Status
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.artifact import (
    MANIFEST_FILE,
    Decoder,
    Manifest,
    Precision,
    Verification,
    VerifyMethod,
)
from headrace.serving.metering.books import Books
from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.observe import Metrics
from headrace.serving.testing.signing import sign_artifact, trust_key


@pytest.fixture
def config(tmp_path) -> Config:
    made = Config.load(tmp_path / "home")
    made.prepare_home()
    return made


@pytest.fixture
def listener():
    """A program of somebody else's that holds a port and says nothing."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def only(findings) -> checkup.Finding:
    (finding,) = findings
    return finding


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def artifact(config: Config, weights: bytes, method: VerifyMethod = VerifyMethod.ENGINE) -> None:
    folder = config.artifacts_dir / "abc"
    folder.mkdir()
    (folder / "weights").write_bytes(weights)
    manifest = Manifest(
        artifact_id="abc" * 20,
        model="m",
        family="qwen",
        target="cpu",
        precision=Precision.INT8,
        engine="native",
        decoder=Decoder(
            layers=1,
            hidden=1,
            heads=1,
            kv_heads=1,
            head_dim=1,
            ffn=1,
            vocab=1,
            rms_eps=0.1,
            qkv_bias=False,
            qk_norm=False,
            tied=True,
            context_tokens=1,
        ),
        eos_token_ids=(0,),
        bos_token_id=None,
        weight_bytes=7,
        verification=Verification(
            reference="r",
            tokens=1,
            max_abs_error=0.0,
            top1_agreement=1.0,
            perplexity=1.0,
            perplexity_reference=1.0,
            tolerance="t",
            method=method,
        ),
        source="s",
        files={"weights": hashlib.sha256(b"weights").hexdigest()},
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    sign_artifact(folder)
    trust_key(config.home / "trust")


def test_the_report_is_json_for_scripts_and_the_exit_code_says_whether_all_is_well(config, capsys):
    code = cli.main(["doctor", "--json", "--home", str(config.home)])

    report = json.loads(capsys.readouterr().out)
    failed = [line for line in report if line["status"] == "fail"]
    assert code == (1 if failed else 0)
    assert {"python", "packages", "cpu", "memory", "native", "config", "home", "disk"} <= {
        line["name"] for line in report
    }
    assert all(line["fix"] for line in report if line["status"] != "ok")


def test_people_get_one_line_for_each_matter(config, capsys):
    cli.main(["doctor", "--home", str(config.home)])

    out = capsys.readouterr().out
    assert out.startswith("ok   python     ")
    assert f"home       {config.home}, for its owner only" in out


def test_a_configuration_that_is_refused_is_the_finding(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("frontent: {}")

    code = cli.main(["doctor", "--json", "--home", str(tmp_path)])

    last = json.loads(capsys.readouterr().out)[-1]
    assert code == 1
    assert (last["name"], last["status"]) == ("config", "fail")
    assert "'frontent'" in last["what"]


def test_a_home_that_does_not_exist_yet_is_left_alone(tmp_path):
    config = Config.load(tmp_path / "later")

    finding = only(checkup.check_home(config))

    assert finding.status is Status.OK
    assert not config.home.exists()


def test_a_secret_that_others_can_read_is_pointed_out(config):
    config.pepper_path.write_text("x" * 64)
    config.pepper_path.chmod(0o644)

    finding = only(checkup.check_home(config))

    assert finding.status is Status.WARN
    assert finding.fix == f"Run `chmod 600 {config.pepper_path}`."


def test_an_intact_artifact_passes_and_a_changed_one_does_not(config):
    artifact(config, b"weights")
    intact = only(checkup.check_artifacts(config))
    (config.artifacts_dir / "abc" / "weights").write_bytes(b"Weights")
    changed = only(checkup.check_artifacts(config))

    assert (intact.status, intact.what) == (Status.OK, "m int8 abcabcabcabc is intact")
    assert changed.status is Status.FAIL
    assert "headrace compile" in changed.fix


@pytest.mark.parametrize("method", [VerifyMethod.NETWORK, VerifyMethod.NONE])
def test_an_engine_that_was_never_run_is_a_warning(config, method):
    """Serving refuses it: better said before than at start."""
    artifact(config, b"weights", method)

    finding = only(checkup.check_artifacts(config))

    assert (finding.status, "never run" in finding.what) == (Status.WARN, True)
    assert "headrace models verify m --variant cpu/int8" in finding.fix


def test_an_artifact_of_a_stranger_is_a_failure(config):
    artifact(config, b"weights")
    for key in config.trust_dir.iterdir():
        key.unlink()

    finding = only(checkup.check_artifacts(config))

    assert (finding.status, "signed with the key" in finding.what) == (Status.FAIL, True)
    assert "headrace models trust add" in finding.fix


def findings(config) -> dict[str, Status]:
    return {each.name: each.status for each in checkup.check_records(config)}


def test_the_books_are_checked_without_a_frontend(config):
    assert findings(config) == {"meter log": Status.OK, "ledger": Status.OK}

    Books(config, clock=SystemClock(), metrics=Metrics(), epoch="life").close()
    assert findings(config) == {"meter log": Status.OK, "ledger": Status.OK}

    with config.ledger_path.open("r+b") as file:
        file.write(b"damaged" * 10)
    assert findings(config) == {"meter log": Status.OK, "ledger": Status.FAIL}


def test_a_flipped_bit_of_the_meter_log_is_found(config):
    """Two lives: the first one's record is followed by others, so it cannot be a torn write."""
    for _ in range(2):
        Books(config, clock=SystemClock(), metrics=Metrics(), epoch="life").close()
    (segment,) = config.meterlog_dir.glob("*.seg")
    content = bytearray(segment.read_bytes())
    content[content.index(b"\x08", fmt.HEADER_BYTES + fmt.FRAME_BYTES)] ^= 1
    segment.write_bytes(content)

    assert findings(config)["meter log"] is Status.FAIL


def test_a_port_that_somebody_else_holds_is_named_with_its_key(config, listener):
    busy = config.with_overrides({"directory.address": f"127.0.0.1:{free_port()}"})
    free = only(checkup.check_directory(busy))
    http = busy.with_overrides({"frontend.grpc_port": free_port(), "frontend.http_port": listener})
    ports = list(checkup.check_frontend(http))

    assert (free.status, "is free" in free.what) == (Status.OK, True)
    assert [finding.status for finding in ports] == [Status.OK, Status.FAIL]
    assert "frontend.http_port" in ports[1].fix


def test_a_stranger_on_the_grpc_port_is_no_frontend(config, listener, monkeypatch):
    monkeypatch.setattr(checkup, "ANSWER_S", 0.2)
    taken = config.with_overrides({"frontend.grpc_port": listener})

    finding = only(checkup.check_frontend(taken))

    assert finding.status is Status.FAIL
    assert "gives no health" in finding.what


def test_a_frontend_with_tls_is_only_seen_to_listen(config, listener):
    secure = config.with_overrides(
        {"frontend": {"grpc_port": listener, "tls_cert": "/c", "tls_key": "/k"}}
    )

    finding = only(checkup.check_frontend(secure))

    assert (finding.status, "with TLS" in finding.what) == (Status.OK, True)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (health_pb2.HealthCheckResponse.SERVING, Status.OK),
        (health_pb2.HealthCheckResponse.NOT_SERVING, Status.WARN),
    ],
)
def test_a_running_frontend_is_asked_how_it_is(config, state, status):
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", state)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    finding = only(checkup.check_frontend(config.with_overrides({"frontend.grpc_port": port})))
    server.stop(None).wait()

    assert (finding.name, finding.status) == ("frontend", status)


def test_a_cpu_without_vnni_is_a_warning_and_one_with_it_is_not(tmp_path):
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    old.write_text("processor : 0\nflags\t: fpu avx2\n")
    fresh.write_text("flags\t: fpu avx2 avx512f avx512_vnni\n")

    assert only(checkup.check_cpu(old)).status is Status.WARN
    assert only(checkup.check_cpu(fresh)).status is Status.OK
    assert only(checkup.check_cpu(tmp_path / "absent")).status is Status.WARN


def test_little_memory_is_a_warning(tmp_path):
    little = tmp_path / "meminfo"
    little.write_text("MemTotal: 9000000 kB\nMemAvailable: 1000000 kB\n")

    finding = only(checkup.check_memory(little))

    assert (finding.status, finding.what) == (Status.WARN, "1.0 GB available")
    assert only(checkup.check_memory(tmp_path / "absent")).status is Status.WARN


def test_a_missing_package_is_named():
    findings = list(checkup.check_packages(["grpcio", "no-such-package-of-ours"]))

    assert findings[0].status is Status.FAIL
    assert "no-such-package-of-ours" in findings[0].what
