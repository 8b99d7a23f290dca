"""Many clients of one server, some of which leave: no answer is lost or wrong; nothing leaks."""

import asyncio
import json
import random
from dataclasses import dataclass, field

import httpx
import numpy as np
import psutil
import pytest
from server_process import metric, picture, picture_url, question, running, until

import perception_rt as prt

CLIENTS = 32
REQUESTS = 5000
LEAVING = 0.3
KIB_PER_REQUEST = 1.0
QUESTIONS = [("Where is the 5?", "locate"), ("Is there a 4?", "exists"), ("a", "read")]
TEXTS = [f"a photo of the handwritten digit {number}" for number in range(10)]
DIGITS = [f"digit_{number}" for number in range(4)]


@dataclass
class Outcomes:
    """Counts, and what was wrong."""

    good: int = 0
    left: int = 0
    busy: int = 0
    wrong: list[str] = field(default_factory=list)


class Clients:
    """Sends random requests and compares answers with those of the engines in this process."""

    def __init__(self, base: str, pe: prt.Embedder, plm: prt.Generator) -> None:
        self.base = base
        self.outcomes = Outcomes()
        self.answers = [
            plm.generate(text, images=[picture(image)], max_new_tokens=24).text
            for text, image in QUESTIONS
        ]
        self.texts = pe.embed_texts(TEXTS)
        self.images = pe.embed_images([picture(name) for name in DIGITS])
        self.urls = [picture_url(name) for name in DIGITS]
        self.messages = [question(text, image) for text, image in QUESTIONS]

    async def run(self, requests: int, seed: int, leaving: float = LEAVING) -> None:
        rng = random.Random(seed)
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.base, timeout=120, limits=limits) as http:
            todo = iter(range(requests))

            async def client() -> None:
                for _ in todo:
                    await self.one(http, rng, leaving)

            await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def one(self, http: httpx.AsyncClient, rng: random.Random, leaving: float) -> None:
        kind = rng.choice(("chat", "stream", "text", "image"))
        index = rng.randrange(3)
        if kind in ("chat", "stream"):
            body = {"model": "PLM-Demo", "messages": self.messages[index], "max_tokens": 24}
            path = "/v1/chat/completions"
        else:
            images = {"input": self.urls[index], "modality": "image"}
            body = {"model": "PE-Demo", **(images if kind == "image" else {"input": TEXTS[index]})}
            path = "/v1/embeddings"
        body["stream"] = True if kind == "stream" else None
        wait = rng.uniform(0.001, 0.05) if rng.random() < leaving else 120
        try:
            answer = await asyncio.wait_for(http.post(path, json=body), wait)
        except TimeoutError:
            self.outcomes.left += 1
            return
        except httpx.TransportError as error:
            self.outcomes.wrong.append(f"{kind} {index}: {error!r}")
            return
        if answer.status_code == 429:
            self.outcomes.busy += 1
        elif answer.status_code == 200 and self.fits(kind, index, answer):
            self.outcomes.good += 1
        else:
            self.outcomes.wrong.append(f"{kind} {index}: {answer.status_code} {answer.text[:200]}")

    def fits(self, kind: str, index: int, answer: httpx.Response) -> bool:
        if kind == "chat":
            return answer.json()["choices"][0]["message"]["content"] == self.answers[index]
        if kind == "stream":
            lines = [line[6:] for line in answer.text.split("\n\n") if line]
            chunks = [json.loads(line) for line in lines[:-1]]
            deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            return lines[-1] == "[DONE]" and "".join(deltas) == self.answers[index]
        expected = self.texts[index] if kind == "text" else self.images[index]
        return np.allclose(answer.json()["data"][0]["embedding"], expected, atol=1e-5)


def connected(server: psutil.Process) -> bool:
    """Whether the server has a connection that it did not close."""
    return any(c.status != psutil.CONN_LISTEN for c in server.net_connections("tcp"))


@pytest.mark.slow
def test_mixed_clients_some_of_which_leave(pe: prt.Embedder, plm: prt.Generator) -> None:
    with running("demo:pe", "demo:plm", "--threads", "1") as (base, process):
        clients = Clients(base, pe, plm)
        server = psutil.Process(process.pid)
        asyncio.run(clients.run(REQUESTS // 5, seed=0))  # caches and pools reach their size
        until(lambda: not connected(server))
        rss, files, threads = server.memory_info().rss, server.num_fds(), server.num_threads()
        asyncio.run(clients.run(REQUESTS, seed=1))
        assert process.poll() is None
        assert clients.outcomes.wrong == []
        sent, outcomes = REQUESTS + REQUESTS // 5, clients.outcomes
        # None is lost: each is answered, or its client left; the server's counts agree.
        assert (outcomes.good + outcomes.left, outcomes.busy) == (sent, 0)
        assert 0.2 * sent < outcomes.left < 0.35 * sent
        until(lambda: metric(base, "perception_rt_requests_in_progress") == 1)  # this one
        routes = ("/v1/embeddings", "/v1/chat/completions")
        answered, departed = (
            sum(metric(base, "perception_rt_requests_total", route=r, status=s) for r in routes)
            for s in ("200", "499")
        )
        assert outcomes.good <= answered <= sent
        assert answered + departed <= sent
        assert metric(base, "perception_rt_errors_total") == 0
        grown = (server.memory_info().rss - rss) / 1024 / REQUESTS
        print(outcomes, f"{answered=} {departed=} {grown:.2f} KiB per request")
        print(files, server.num_fds(), threads, server.num_threads())
        assert grown < KIB_PER_REQUEST
        # No row of the cache is in use; the gauges are as of the latest question.
        asyncio.run(clients.run(CLIENTS, seed=2, leaving=0))
        assert clients.outcomes.wrong == []
        for name in ("running_requests", "queued_requests"):
            until(lambda name=name: metric(base, f"perception_rt_{name}") == 0)
        until(lambda: not connected(server))
        assert server.num_fds() <= files
        # Pools start a thread when more clients than before wait at once, up to a few more.
        assert server.num_threads() <= threads + 8
