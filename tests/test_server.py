"""A real ``vllm serve`` process, driven by the ``openai`` client as any other server is."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.runners import VLLM

from vllm_twist import results

#: Seconds after which a wait is a hang.
HANG = 600
MODEL = "models/tiny-reviews"
HEAD = "models/tiny-reviews-positive"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server with a twist head and 32 slots; yield its address."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    env = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", MODEL, "--twist-head", HEAD, "--twist-particles", "8",
        "--twist-ess-threshold", "0.5", "--twist-resampling", "systematic", "--twist-scale", "1.0",
        "--enforce-eager", "--max-num-seqs", "32", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-memory-bytes", str(2**26), "--enable-scale-out",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=repo_root, env=env, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(3 * HANG):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=HANG)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.3)
        else:
            pytest.fail(f"the server did not come up: {log.read_text()[-4000:]}")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=HANG)


def metric(server: str, name: str) -> float:
    text = urllib.request.urlopen(f"{server}/metrics", timeout=HANG).read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def wait_until_idle(server: str) -> None:
    for _ in range(5 * HANG):
        running = metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting")
        if running == 0 and metric(server, "vllm:kv_cache_usage_perc") == 0:
            return
        time.sleep(0.2)
    pytest.fail("requests or KV blocks are left over")


def twist_of(response: Any) -> list[Any]:
    return results(response.model_extra["kv_transfer_params"])


def complete(client: openai.OpenAI, prompt: Any = "I bought this", **options: Any) -> Any:
    extra = {key: options.pop(key) for key in list(options) if key.startswith("twist")}
    return client.completions.create(
        model=MODEL, prompt=prompt, **{"max_tokens": 24, **options}, extra_body={"vllm_xargs": extra} if extra else None
    )


def test_completion(client: openai.OpenAI):
    """An unchanged client gets a draw from the target; the JSON carries the result."""
    response = complete(client, seed=1)
    (group,) = twist_of(response)
    assert response.choices[0].text
    assert math.isfinite(group.log_z) and 1 <= group.ess <= 8.001
    assert group.particles is None
    again = complete(client, seed=1)
    assert again.choices[0].text == response.choices[0].text


def test_request_keys(client: openai.OpenAI):
    response = complete(client, seed=1, twist_particles=32, twist_return_particles=1, twist_scale=0.5,
                        twist_ess_threshold=1.0, twist_resampling="residual")  # fmt: skip
    (group,) = twist_of(response)
    assert len(group.particles) == 32
    assert sum(math.exp(p.log_weight) for p in group.particles) == pytest.approx(1)
    plain = complete(client, seed=1, twist=0)
    assert plain.model_extra["kv_transfer_params"] is None


def test_pinned_continuation(client: openai.OpenAI):
    """Token ids pass HTTP as a list; the pinned particle is the first one, whatever was drawn."""
    drawn = twist_of(complete(client, seed=1, twist_return_particles=1, max_tokens=12))[0].particles[3].token_ids
    response = complete(client, seed=2, twist_pinned=drawn, twist_return_particles=1, max_tokens=12)
    (group,) = twist_of(response)
    assert group.particles[0].token_ids == drawn and group.particles[1].token_ids != drawn
    with pytest.raises(openai.BadRequestError, match="`twist_pinned` must have at most `max_tokens`=2 tokens"):
        complete(client, twist_pinned=drawn[:3], max_tokens=2)


def test_choices(client: openai.OpenAI):
    """One entry per choice, for n = 2 and for two prompts."""
    response = complete(client, n=2, seed=3)
    assert len(response.choices) == len(twist_of(response)) == 2
    assert len({group.log_z for group in twist_of(response)}) == 2
    response = complete(client, ["I bought this", "The battery"], n=2, seed=3)
    assert len(response.choices) == len(twist_of(response)) == 4


def test_chat(client: openai.OpenAI):
    response = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "This blender"}], max_tokens=24, seed=1
    )
    assert response.choices[0].message.content
    assert len(twist_of(response)) == 1
    open_ended = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "This blender"}])
    assert open_ended.choices[0].finish_reason in ("stop", "length")


def test_streaming(client: openai.OpenAI):
    """Tokens arrive when the group is done, as the same text."""
    whole = complete(client, seed=5)
    chunks = list(complete(client, seed=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    if VLLM >= (0, 33):
        assert twist_of(chunks[-1]) == twist_of(whole)


def test_stop_string_and_logprobs(client: openai.OpenAI):
    """A stop string ends particles: a lone one, which nothing else can change, is cut; logprobs cover its tokens."""
    whole = complete(client, seed=6, logprobs=2, twist_particles=1)
    text = whole.choices[0].text
    assert len(whole.choices[0].logprobs.token_logprobs) == whole.usage.completion_tokens
    stop = text[5:9]
    cut = complete(client, seed=6, stop=stop, twist_particles=1)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < whole.usage.completion_tokens
    assert stop not in complete(client, seed=6, stop=stop).choices[0].text


BAD = [
    ({"twist_particles": 0}, "`twist_particles` must be at least 1, got 0"),
    ({"twist_particles": 33}, "`twist_particles` must be at most `max_num_seqs`=32, got 33"),
    ({"twist_particles": 1.5}, "`twist_particles` must be an integer"),
    ({"twist_ess_threshold": -1}, "`twist_ess_threshold` must lie in [0, inf)"),
    ({"twist_resampling": "best"}, "`twist_resampling` must be one of"),
    ({"twist_partices": 4}, "did you mean 'twist_particles'?"),
    ({"twist": 7}, "`twist` must be 0 or 1"),
    ({"temperature": 0}, "`temperature` must be above 0 with a twist"),
    ({"echo": True, "logprobs": 1}, "`prompt_logprobs` is not supported together with a twist"),
    ({"echo": True, "logprobs": 0}, "`prompt_logprobs` is not supported together with a twist, got 0"),
    ({"twist_head": "x"}, "`twist_head` is an option of the engine, not of a request"),
]


@pytest.mark.parametrize("options, message", BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_http_400(client: openai.OpenAI, options: dict[str, Any], message: str):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert message in str(caught.value)


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Return status and answer of a request to an endpoint that the client may not know."""
    url = str(client.base_url).removesuffix("v1/") + path
    data = json.dumps({"model": MODEL, **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


CHAT = {"messages": [{"role": "user", "content": "This blender"}], "max_tokens": 8}


@pytest.mark.parametrize(
    "path, body",
    [
        ("v1/completions", {"prompt": "I bought this", "max_tokens": 8}),
        ("v1/chat/completions", CHAT),
        ("v1/chat/completions/batch", {**CHAT, "messages": [CHAT["messages"]]}),
        ("v1/responses", {"input": "This blender", "max_output_tokens": 8}),
        ("v1/messages", CHAT),
        ("inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {"max_tokens": 8}}),
    ],
)
def test_keys_beside_vllm_xargs_are_refused(client: openai.OpenAI, path: str, body: dict[str, Any]):
    """They would be passed over in silence; without them the request is served."""
    assert post(client, path, body)[0] == 200
    status, answer = post(client, path, {**body, "twist_particles": 4})
    assert status == 400
    message = answer["error"]["message"]
    assert '`twist_particles` must be sent in `vllm_xargs`, got it beside: send "vllm_xargs": {"twist_' in message


@pytest.mark.parametrize("temperature", [0, 1])
def test_beam_search_is_plain(client: openai.OpenAI, temperature: int):
    """It cannot be told to be, so it is; settings for it are refused."""

    def search(**extra: Any) -> Any:
        return client.completions.create(
            model=MODEL, prompt="I bought this", max_tokens=8, n=2, temperature=temperature,
            extra_body={"use_beam_search": True, "vllm_xargs": extra or None},
        )  # fmt: skip

    response = search()
    assert len({choice.text for choice in response.choices}) == 2
    assert response.model_extra["kv_transfer_params"] is None
    assert [choice.text for choice in search(twist=0).choices] == [choice.text for choice in response.choices]
    with pytest.raises(openai.BadRequestError, match="`twist_particles` is not supported together with `use_beam_sea"):
        search(twist_particles=4)


def test_scores_of_labels_are_plain(client: openai.OpenAI):
    """They are made of requests for logprobs of given tokens, which cannot be twisted nor told not to be."""
    body = {"query": "This is", "items": ["good", "bad"], "label_token_ids": [5, 6]}
    status, answer = post(client, "generative_scoring", body)
    assert status == 200 and [0 < entry["score"] < 1 for entry in answer["data"]] == [True, True], answer


def test_structured_outputs_are_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="structured_outputs"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}
        )


def test_broken_weights_are_an_error_that_says_so(client: openai.OpenAI, server: str):
    with pytest.raises(openai.InternalServerError, match="NaN, infinite or all zero: check the head"):
        complete(client, twist_scale=3e38)
    with pytest.raises(openai.APIError, match="NaN, infinite or all zero: check the head"):
        list(complete(client, twist_scale=3e38, stream=True))
    with pytest.raises(openai.InternalServerError, match="NaN, infinite or all zero: check the head"):
        complete(client, twist_scale=3e38, n=2)
    assert complete(client, seed=1).choices[0].text
    wait_until_idle(server)


def test_disconnect_mid_way_frees_everything(client: openai.OpenAI, server: str):
    """A client that leaves takes its lanes along, and the groups that wait for theirs; the next one is served."""
    body = json.dumps({"model": MODEL, "prompt": "My daughter", "max_tokens": 200, "ignore_eos": True, "n": 100,
                       "vllm_xargs": {"twist_particles": 32}}).encode()  # fmt: skip
    host, port = server.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    complete(client, n=2, max_tokens=1)
    assert metric(server, "vllm:request_success_total") >= 2
    finished = metric(server, "vllm:request_success_total")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        for _ in range(50 * HANG):
            if metric(server, "vllm:num_requests_running") > 0:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the request never ran")
    wait_until_idle(server)
    assert metric(server, "vllm:request_success_total") < finished + 100
    assert complete(client, seed=1).choices[0].text


def test_many_clients(client: openai.OpenAI, server: str):
    """Twisted and plain requests side by side, more lanes than slots; all are answered."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(i: int) -> Any:
        return complete(client, seed=i, **({"twist_particles": 12} if i % 3 else {"twist": 0}))

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(ask, range(24)))
    assert all(response.choices[0].text for response in responses)
    wait_until_idle(server)
