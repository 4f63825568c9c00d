"""The configuration: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster import specs
from cluster.config import Config, from_tree, load
from cluster.config_errors import ConfigError
from tests.cluster.helpers import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def refused(tree: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as error:
        from_tree(tree, "x.yaml")
    return str(error.value)


def test_no_file_gives_the_defaults(model: Path) -> None:
    config = load(None, [f"model.path={model}"])
    assert (config.prefill.replicas, config.decode.replicas) == (1, 1)
    assert (config.router.http, config.router.grpc) == ("127.0.0.1:8000", "127.0.0.1:8001")
    assert config.decode.kv_cache_bytes == 256 << 20
    assert config.cluster.launcher == "ray" and config.cluster.address == "local"


def test_the_default_model_is_in_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Path(load().model.path) / "config.json").is_file()


def test_a_file_and_an_override_meet(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text("model: {path: model}\ndecode: {replicas: 2, num_cpus: 3}\nprefill:\n")
    config = load(file, ["decode.replicas=3", "router.policy=always-local", "kvtransfer.handoff_timeout_s=2"])
    assert config.model.path == str(model), "relative paths are tried beside the file first"
    assert (config.decode.replicas, config.decode.threads) == (3, 3)
    assert config.router.policy == "always-local"
    assert config.kvtransfer.handoff_timeout_s == 2.0
    assert config.prefill == Config().prefill


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().decode.replicas = 2


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"decode": {"replcas": 2}}, ["decode.replcas = 2", "unknown key", "'replicas'"]),
        ({"decoder": {}}, ["decoder", "unknown key", "'decode'"]),
        ({"decode": {"launcher": "ray"}}, ["decode.launcher", "cluster.launcher"]),
        ({"decode": {"zzz": 1}}, ["decode.zzz = 1", "known here", "replicas"]),
        ({"decode": {"replicas": "two"}}, ["decode.replicas = 'two'", "whole number"]),
        ({"decode": {"replicas": 2.5}}, ["decode.replicas = 2.5", "whole number"]),
        ({"decode": {"replicas": True}}, ["decode.replicas = True", "whole number"]),
        ({"decode": {"replicas": 0}}, ["decode.replicas = 0", "at least 1"]),
        ({"prefill": {"replicas": -1}}, ["prefill.replicas = -1", "at least 0"]),
        ({"decode": {"kv_cache_gib": 0}}, ["decode.kv_cache_gib = 0", "more than 0"]),
        ({"decode": {"kv_cache_gib": float("nan")}}, ["decode.kv_cache_gib"]),
        ({"decode": {"num_cpus": float("inf")}}, ["decode.num_cpus = inf", "finite"]),
        ({"decode": 3}, ["decode = 3", "section"]),
        ({"decode": {"block_size": 24}}, ["decode.block_size = 24", "power of two"]),
        ({"decode": {"tensor_parallel": 0}}, ["decode.tensor_parallel = 0", "at least 1"]),
        (
            {"decode": {"num_gpus": 0.5, "tensor_parallel": 2}},
            ["decode.num_gpus = 0.5", "decode.tensor_parallel = 2", "share a GPU"],
        ),
        ({"decode": {"placement": "spread"}}, ["decode.placement = 'spread'", "one rank", "tensor_parallel"]),
        (
            {"decode": {"placement": "spread", "tensor_parallel": 2}, "cluster": {"launcher": "plain"}},
            ["decode.placement = 'spread'", "no Ray"],
        ),
        ({"kvtransfer": {"wire_dtype": "int3"}}, ["kvtransfer.wire_dtype = 'int3'", "'int8'"]),
        ({"kvtransfer": {"min_bandwidth": -1}}, ["kvtransfer.min_bandwidth = -1"]),
        (
            {"kvtransfer": {"min_bandwidth": 2.5}, "prefill": {"replicas": 0}},
            ["kvtransfer.min_bandwidth = 2.5", "prefill.replicas is 0"],
        ),
        ({"kvtransfer": {"gather": "sometimes"}}, ["kvtransfer.gather = 'sometimes'", "'always'"]),
        (
            {"kvtransfer": {"wire_dtype": "int8"}, "prefill": {"replicas": 0}},
            ["kvtransfer.wire_dtype = 'int8'", "prefill.replicas is 0"],
        ),
        (
            {"kvtransfer": {"gather": "never"}, "prefill": {"replicas": 0}},
            ["kvtransfer.gather = 'never'", "prefill.replicas is 0"],
        ),
        (
            {"kvtransfer": {"wire_dtype": "int8", "gather": "never"}},
            ["kvtransfer.gather = 'never'", "kvtransfer.wire_dtype = 'int8'", "auto"],
        ),
        ({"model": {"dtype": "float23"}}, ["model.dtype = 'float23'", "'float32'", "did you mean 'float32'"]),
        (
            {"cluster": {"address": "ray://h:10001"}},
            ["cluster.address = 'ray://h:10001'", "HOST:PORT of a Ray head"],
        ),
        (
            {"decode": {"resources": {"fast": 1}}},
            ["decode.resources", "cluster.address is 'local'", "HOST:PORT"],
        ),
        (
            {"decode": {"resources": {"fast": 0}}, "cluster": {"address": "auto"}},
            ["decode.resources.fast = 0", "more than 0"],
        ),
        ({"router": {"http": "localhost"}}, ["router.http = 'localhost'", "HOST:PORT"]),
        ({"router": {"http": "localhost:99999"}}, ["router.http", "HOST:PORT"]),
        (
            {"router": {"http": "a:8000", "grpc": "a:8010", "replicas": 2}},
            ["router.replicas = 2", "a:8010, a:8020", "anew"],
        ),
        ({"router": {"http": "a:65530", "replicas": 2}}, ["router.replicas = 2", "a:65540", "65535"]),
        ({"router": {"prefix_index_entries": 0}}, ["router.prefix_index_entries = 0", "at least 1"]),
        ({"router": {"http": "a:1", "grpc": "a:1"}}, ["router.http = router.grpc = 'a:1'", "change one"]),
        (
            {"router": {"policy": "treshold"}},
            ["router.policy = 'treshold'", "always-local", "mean 'threshold'"],
        ),
        ({"router": {"policy": "nowhere.to_be:found"}}, ["router.policy", "No module named", "PYTHONPATH"]),
        ({"router": {"policy": "router.policies:POLICIES"}}, ["is a dict, not a function"]),
        (
            {"router": {"local_below_tokens": 9}},
            ["router.local_below_tokens = 9", "no effect", "router.policy to threshold"],
        ),
        (
            {"router": {"decision_log": "x.log", "decisions_mib": 0}},
            ["router.decision_log = 'x.log'", "router.decisions_mib = 0", "raise it"],
        ),
        ({"router": {"itl_ms": 0}}, ["router.itl_ms = 0", "at least 1"]),
        ({"kvtransfer": {"transport": "rdma"}}, ["kvtransfer.transport = 'rdma'", "'nixl'"]),
        ({"kvtransfer": {"slots": 1}}, ["kvtransfer.slots = 1", "at least 2"]),
        ({"cluster": {"launcher": "plain", "address": "a:1"}}, ["cluster.address = 'a:1'", "plain", "ray"]),
        (
            {"cluster": {"restart_backoff_s": 5.0, "restart_backoff_max_s": 1.0}},
            ["cluster.restart_backoff_max_s = 1.0", "cluster.restart_backoff_s = 5.0"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tree: dict[str, object], words: list[str]) -> None:
    message = refused(tree)
    assert message.startswith("x.yaml: ")
    for word in words:
        assert word in message
    assert "pydantic" not in message and len(message.splitlines()) == 1


def test_every_mistake_gets_a_line() -> None:
    assert len(refused({"decode": {"replicas": 0, "nope": 1}, "modle": {}}).splitlines()) == 3


def test_the_two_sides_may_differ_in_blocks_and_ranks() -> None:
    prefill = {"block_size": 32, "tensor_parallel": 2}
    decode = {"block_size": 16, "tensor_parallel": 4}
    config = from_tree({"prefill": prefill, "decode": decode}, "x")
    assert (config.prefill.block_size, config.decode.tensor_parallel) == (32, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decode: {replicas: 1, replicas: 2}", ["line 1", "'replicas'", "twice"]),
        ("- a", ["sections"]),
        ("decode: [", ["not YAML"]),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_a_missing_file_and_a_missing_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="model.path = './no/where'.*config.json"):
        load(None, ["model.path=./no/where"])


@pytest.mark.parametrize("override", ["decode.replicas", "replicas=2", "=2", "a.b.c=2", "decode.=1"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="SECTION.KEY=VALUE"):
        load(None, [override])


def test_gpus_that_are_not_there_are_refused() -> None:
    config = from_tree({"decode": {"num_gpus": 1, "replicas": 2}}, "x")
    with pytest.raises(ConfigError, match=r"decode.num_gpus = 1 x 2: PyTorch sees 0 .* set num_gpus to 0"):
        specs.check_machine(config, cuda_devices=0)
    with pytest.raises(ConfigError, match="lower num_gpus"):
        specs.check_machine(config, cuda_devices=1)
    specs.check_machine(config, cuda_devices=2)


def test_a_context_beyond_the_model_is_refused(model: Path) -> None:
    config = load(None, [f"model.path={model}", "model.max_model_len=513"])
    with pytest.raises(ConfigError, match="model.max_model_len = 513: .* 512 tokens"):
        specs.model_config(config)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_more_ranks_than_query_heads_are_refused(model: Path, role: str) -> None:
    config = load(None, [f"model.path={model}", f"{role}.tensor_parallel=5"])
    with pytest.raises(
        ConfigError, match=rf"{role}.tensor_parallel = 5: the model has 4 query heads.* use 4 or less"
    ):
        specs.model_config(config)
    specs.model_config(load(None, [f"model.path={model}", f"{role}.tensor_parallel=4"]))


def test_a_pool_without_workers_may_have_any_ranks(model: Path) -> None:
    specs.model_config(
        load(None, [f"model.path={model}", "prefill.replicas=0", "prefill.tensor_parallel=99"])
    )


@pytest.mark.parametrize(("said", "told"), [("stored", ""), ("int8", "int8"), ("fp8_e4m3", "fp8_e4m3")])
def test_the_workers_are_told_how_kv_crosses(model: Path, said: str, told: str) -> None:
    ways = [
        "cluster.silence_s=7.0",
        "prefill.tensor_parallel=2",
        f"kvtransfer.wire_dtype={said}",
        "kvtransfer.gather=always",
    ]
    config = load(None, [f"model.path={model}", *ways])
    for seat in specs.seats(config, specs.model_config(config), "secret"):
        assert (seat.spec.wire_dtype, seat.spec.gather) == (told, "always")
        assert seat.spec.tensor_parallel == (2 if seat.spec.role == "prefill" else 1)
        assert seat.spec.rank_timeout_s == 7.0


def test_the_processes_are_told_what_the_file_says(model: Path) -> None:
    overrides = ["prefill.replicas=2", "decode.replicas=2", "decode.num_gpus=0.5", "prefill.num_gpus=1"]
    overrides += ["decode.kv_cache_gib=0.5", "kvtransfer.slots=4", "router.policy=threshold"]
    overrides += ["router.local_below_tokens=7", "router.ttft_ms=300", "model.itl_ms=20"]
    config = load(None, [f"model.path={model}", *overrides])
    facts = specs.model_config(config)
    seats = specs.seats(config, facts, "secret")
    assert [seat.spec.worker_id for seat in seats] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert [seat.place.gpu for seat in seats] == [0, 1, 2, 2], "half a GPU each: two share one"
    decode = seats[-1].occupied("life-1")
    assert (decode.incarnation, decode.token, decode.device) == ("life-1", "secret", "cuda")
    assert (decode.kv_cache_bytes, decode.slots) == (1 << 29, 4)
    router = specs.router_spec(config, facts, "secret")
    assert (router.served_name, router.max_model_len, router.local_below_tokens) == ("model", 512, 7)
    assert (router.policy, router.ttft_s, router.itl_s) == ("threshold", 0.3, 0.02)


def test_the_router_is_told_how_to_log(model: Path) -> None:
    config = load(None, [f"model.path={model}", "router.log_format=json"])
    facts = specs.model_config(config)
    assert specs.router_spec(config, facts, "secret").log_format == "json"
    assert specs.router_spec(load(None, [f"model.path={model}"]), facts, "secret").log_format == "text"
    assert "router.log_format = 'xml': must be 'text' or 'json'" in refused({"router": {"log_format": "xml"}})


@pytest.mark.parametrize(
    ("settings", "bind", "advertise"),
    [
        ([], "127.0.0.1", "127.0.0.1"),
        (["cluster.bind_host=0.0.0.0"], "0.0.0.0", "127.0.0.1"),
        # Empty: the worker fills in the address of the node on which it finds itself.
        (["cluster.address=10.0.0.1:6379"], "", ""),
        (["cluster.address=10.0.0.1:6379", "cluster.bind_host=0.0.0.0"], "0.0.0.0", ""),
        (["cluster.address=auto", "cluster.advertise_host=10.0.0.9"], "", "10.0.0.9"),
    ],
)
def test_where_workers_listen_and_what_they_tell(
    model: Path, settings: list[str], bind: str, advertise: str
) -> None:
    config = load(None, [f"model.path={model}", *settings])
    for seat in specs.seats(config, specs.model_config(config), "token"):
        assert (seat.spec.bind_host, seat.spec.advertise_host) == (bind, advertise)


def test_resources_reach_the_place(model: Path) -> None:
    config = load(None, [f"model.path={model}", "cluster.address=auto", "decode.resources={fast: 2}"])
    seats = specs.seats(config, specs.model_config(config), "token")
    assert [dict(seat.place.resources) for seat in seats] == [{}, {"fast": 2.0}]
