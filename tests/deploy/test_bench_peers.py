"""The peers: what starts them, what installs them, and why one is left out."""

import json

import pytest

from headrace.deploy.bench.contender import Contender, sit_out
from headrace.deploy.bench.llm import Options, assemble
from headrace.deploy.bench.peers import worker
from headrace.deploy.bench.peers.base import Sources
from headrace.deploy.bench.peers.headrace import bench_config, histogram, model_config
from headrace.deploy.bench.peers.in_process import worker_argv
from headrace.deploy.bench.peers.install import NAMES, peer
from headrace.deploy.bench.peers.llama_cpp import LlamaCpp
from headrace.deploy.bench.peers.vllm_cpu import VllmCpu
from headrace.deploy.commands.bench import PEERS
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import ModelNotFound

INT8, INT4 = Precision.INT8, Precision.INT4


def test_the_command_names_the_peers_that_there_are() -> None:
    """They are named twice so that `headrace bench --help` imports none of them."""
    assert PEERS == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_that_is_not_installed_says_how_to_install_it(name, tmp_path) -> None:
    found = peer(tmp_path, name)

    for precision in found.formats:
        why = found.missing(precision)
        assert why is not None
        assert f"headrace bench peers install {name}" in why


def test_an_unknown_peer_is_refused_with_the_known_ones(tmp_path) -> None:
    with pytest.raises(ModelNotFound, match="openvino, llama-cpp"):
        peer(tmp_path, "triton")


def test_who_cannot_run_is_left_out_with_a_reason_and_not_an_error(tmp_path) -> None:
    """A fresh machine has no peers and no artifacts; the benchmark still says what it found."""
    skipped: dict[str, str] = {}

    found = assemble(Options(peers=("llama-cpp",), precisions=(INT4,)), tmp_path, skipped)

    assert found == []
    assert set(skipped) == {"headrace int4", "headrace-engine int4", "llama-cpp q4_0"}
    assert "headrace compile" in skipped["headrace int4"]


def test_llama_cpp_gets_room_for_every_stream_and_our_number_of_threads(tmp_path) -> None:
    argv = LlamaCpp(tmp_path).server_argv(INT4, 4711)

    text = " ".join(argv)
    assert "q4_0.gguf" in text
    assert "--parallel 32 --ctx-size 16384 --threads 2" in text
    assert "--port 4711" in text


def test_every_peer_is_asked_for_the_same_tokens_and_to_go_on_past_the_end(tmp_path) -> None:
    llama = LlamaCpp(tmp_path).body([1, 2], 128)
    vllm = VllmCpu(tmp_path).body([1, 2], 128)

    assert (llama["prompt"], llama["n_predict"], llama["ignore_eos"]) == ([1, 2], 128, True)
    assert (vllm["prompt"], vllm["max_tokens"], vllm["ignore_eos"]) == ([1, 2], 128, True)
    assert (llama["temperature"], vllm["temperature"]) == (0, 0)


def test_prefix_caches_are_off_unless_prompts_share_a_prefix(tmp_path) -> None:
    """A cache that remembers the last round would be measured instead of the engine."""
    assert "--no-enable-prefix-caching" in VllmCpu(tmp_path).server_argv(1)
    assert "--enable-prefix-caching" in VllmCpu(tmp_path, shares_prefix=True).server_argv(1)
    assert LlamaCpp(tmp_path).body([1], 1)["cache_prompt"] is False
    assert LlamaCpp(tmp_path, shares_prefix=True).body([1], 1)["cache_prompt"] is True


def test_a_worker_is_started_where_modules_named_like_peers_cannot_shadow_them(tmp_path) -> None:
    argv = worker_argv(tmp_path / "python", "openvino", tmp_path, shares_prefix=False)

    assert argv[1] == "-P"
    assert json.loads(argv[-1]) == {
        "rows_max": 32,
        "batch_tokens_max": 512,
        "threads": 2,
        "shares_prefix": False,
    }


@pytest.mark.parametrize("name", NAMES)
def test_installing_is_by_package_name_only(name, tmp_path) -> None:
    """No URL, no index of ours: the site's own pip settings decide where packages come from."""
    sources = Sources(checkpoint=tmp_path / "model", gguf=tmp_path / "model.gguf")

    steps = peer(tmp_path, name).install_steps(sources)

    words = [word for step in steps for word in step.argv]
    assert not [word for word in words if "://" in word or "index-url" in word]
    assert all(tmp_path in step.makes.parents for step in steps)


def contender(tmp_path, name: str, tok_s: float) -> Contender:
    found = Contender(peer(tmp_path, name), INT4)
    found.results[8].append({"tok_s": tok_s})
    return found


def test_a_peer_far_behind_the_best_sits_out_that_level(tmp_path) -> None:
    """280 of 500 is less than 0.6: no round can make it the best."""
    openvino = contender(tmp_path, "openvino", 500)
    llama = contender(tmp_path, "llama-cpp", 280)
    onnx = contender(tmp_path, "onnxruntime-genai", 310)

    sit_out([openvino, llama, onnx], levels=(1, 8))

    assert [each.sits_out for each in (openvino, llama, onnx)] == [set(), {8}, set()]


def test_step_overhead_is_read_from_the_metrics_page() -> None:
    page = (
        "# TYPE headrace_step_overhead_ratio histogram\n"
        'headrace_step_overhead_ratio_bucket{le="0.05",model="a"} 3\n'
        'headrace_step_overhead_ratio_sum{model="a"} 1.5\n'
        'headrace_step_overhead_ratio_sum{model="b"} 0.5\n'
        'headrace_step_overhead_ratio_count{model="a"} 30\n'
        'headrace_step_overhead_ratio_count{model="b"} 10\n'
    )

    assert histogram(page, "headrace_step_overhead_ratio") == (2.0, 40.0)


class CountingEngine:
    """Answers every prompt a token a step; remembers how many ran at once."""

    version = "1"

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.most = 0

    def begin(self, streams):
        pass

    def add(self, index, prompt, tokens_out):
        self.running[index] = tokens_out
        self.most = max(self.most, len(self.running))

    def step(self):
        moved = []
        for index in list(self.running):
            self.running[index] -= 1
            whole = self.running[index] == 0
            if whole:
                del self.running[index]
            moved.append((index, 1, whole))
        return moved

    def drop(self, indexes):
        for index in indexes:
            del self.running[index]


def test_a_worker_keeps_as_many_prompts_running_as_there_are_streams() -> None:
    engine = CountingEngine()
    load = {"prompts": [[1]] * 10, "streams": 4, "tokens_out": 5, "time_s_max": 60}

    answers = worker.closed_loop(engine, load)

    assert [len(answer["arrivals"]) for answer in answers] == [5] * 10
    assert engine.most == 4


def test_a_worker_out_of_time_leaves_nothing_running() -> None:
    engine = CountingEngine()
    load = {"prompts": [[1]] * 10, "streams": 4, "tokens_out": 10**9, "time_s_max": 0}

    answers = worker.closed_loop(engine, load)

    assert len(answers) == 4
    assert engine.running == {}


def test_the_engine_is_measured_with_the_limits_it_is_served_with(tmp_path) -> None:
    """An operator who tunes config.yaml sees the effect in the next benchmark."""
    (tmp_path / "config.yaml").write_text(
        "models: [{name: smollm2-135m, precision: int4, replicas: 3, prefill_tokens_max: 64}]"
    )

    found = model_config(tmp_path, "smollm2-135m", INT8)

    assert (found.prefill_tokens_max, found.precision) == (64, INT8)
    assert (found.replicas, found.threads) == (1, 2)


def test_a_turn_has_a_home_of_its_own_beside_the_users_artifacts(tmp_path) -> None:
    """Keys and usage of the benchmark never mix with the user's."""
    home, folder = tmp_path / "home", tmp_path / "turn"
    for each in (home / "artifacts", home / "names", folder):
        each.mkdir(parents=True)

    config = bench_config(folder, home, "smollm2-135m", INT4)

    assert config.artifacts_dir.resolve() == home / "artifacts"
    assert config.ledger_path.parent == folder
    assert [model.precision for model in config.models] == [INT4]
    assert config.frontend.grpc_port == 0
