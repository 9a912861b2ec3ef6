"""`vllm serve` as a process, with the command that `caft export-drafter` prints, asked through the
openai client."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from drafters import DEFAULT, ENVIRONMENT, HEADS, VOCABULARY, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

LENGTH = 30
# seconds for a start or a stop, which take 20 and 1 on a machine with nothing else to do
PATIENCE = 900
TEXTS = ["w3 w5 w7 w11 w2", "w20 w21 w22", "w9 w8 w7 w6", "w4 w4 w5"]


def words():
    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: a model with its tokenizer, its heads, and the drafter made of them."""
    folder = tmp_path_factory.mktemp("server")
    make(folder, "llama", *DEFAULT)
    words().save_pretrained(folder / "model")
    return folder


def is_up(address):
    try:
        urllib.request.urlopen(f"{address}/health", timeout=2)
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(run):
    """The address of a server, started with the printed command."""
    line = next(
        line
        for line in (run / "vllm" / "README.md").read_text().splitlines()
        if "vllm serve" in line
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), *shlex.split(line)[1:]]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--served-model-name", "tuned"]
    log = run / "server.log"
    environment = {**os.environ, **ENVIRONMENT}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_up(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                # the engine's processes, should the server have left them
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(run):
    """transformers' greedy texts, without a cache."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval(),
        words(),
    )
    written = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(LENGTH):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        written.append(tokenizer.convert_ids_to_tokens(ids[0, start:].tolist()))
    return written


def ask(server, text, **more):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    settings = {"max_tokens": LENGTH, "temperature": 0, "extra_body": {"ignore_eos": True}, **more}
    return client.completions.create(model="tuned", prompt=text, **settings)


def tokens(server, text, **more):
    return ask(server, text, logprobs=1, **more).choices[0].logprobs.tokens


def counters(server):
    """Drafts, draft tokens and accepted ones since the start, as /metrics has them."""
    text = urllib.request.urlopen(f"{server}/metrics").read().decode()
    found = re.findall(r"^vllm:spec_decode_num_(\w+)_total\{[^}]*\} ([\d.]+)$", text, re.M)
    return {name: float(value) for name, value in found if "per_pos" not in name}


def test_one_and_eight_at_a_time(server, expected):
    assert [tokens(server, text) for text in TEXTS] == expected
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: tokens(server, text), TEXTS * 2)) == expected * 2
    counted = counters(server)
    assert (
        counted["draft_tokens"] == HEADS * counted["drafts"] > 0 and counted["accepted_tokens"] > 0
    )


def test_a_stream_a_stop_and_a_request_that_is_cancelled(server, expected):
    whole = ask(server, TEXTS[0]).choices[0].text
    assert "".join(part.choices[0].text for part in ask(server, TEXTS[0], stream=True)) == whole
    stop = expected[0][5]
    assert stop not in ask(server, TEXTS[0], stop=[stop]).choices[0].text
    stream = ask(server, TEXTS[1], stream=True)
    next(iter(stream))
    stream.close()
    assert tokens(server, TEXTS[1]) == expected[1]


def test_bad_requests_leave_the_server_up(server, expected):
    with pytest.raises(openai.BadRequestError):
        ask(server, TEXTS[0], max_tokens=10_000)
    with pytest.raises(openai.BadRequestError):
        ask(server, TEXTS[0], temperature=-1)
    assert tokens(server, TEXTS[2]) == expected[2]
