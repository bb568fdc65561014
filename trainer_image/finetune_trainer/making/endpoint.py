"""A model behind an OpenAI-compatible endpoint: ``POST …/chat/completions``, with patience.

What may pass by itself (no connection, 408, 425, 429, 5xx) is tried again by urllib3's ``Retry``, after growing pauses
or after those the server asks for; what will not (the key, the address) ends the run with the remedy.
"""

from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError

ENV_KEY = "OPENAI_API_KEY"
PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that are tried again."""
_CONNECT = 10.0  # seconds
_LONGEST_PAUSE = 60.0  # seconds; where the server names none


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    tokens: int
    """Of question and answer, as the server counts them; 0 where it does not."""
    retries: int


class RequestRefusedError(Exception):
    """The endpoint does not answer this very request (it is too long, or against its rules)."""


class Endpoint:
    """One base URL. Safe in threads."""

    def __init__(self, url: str, key: str, *, timeout: float, max_retries: int, connections: int) -> None:
        """``timeout``: seconds of one try. ``connections``: that are kept open."""
        self.url = url.rstrip("/") + "/chat/completions"
        self._timeout = (min(_CONNECT, timeout), timeout)
        self._session = requests.Session()
        retry = Retry(
            total=max_retries,
            allowed_methods=None,
            status_forcelist=PASSING,
            backoff_factor=0.5,
            backoff_max=_LONGEST_PAUSE,
            backoff_jitter=0.5,
            raise_on_status=False,
            redirect=0,
        )
        adapter = HTTPAdapter(max_retries=retry, pool_connections=1, pool_maxsize=connections)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def chat(self, body: dict[str, Any]) -> Reply:
        """The answer to a chat completion's body.

        RequestRefusedError; RunError: ACCESS_DENIED, INVALID_CONFIGURATION, ENDPOINT_UNAVAILABLE.
        """
        try:
            response = self._session.post(self.url, json=body, timeout=self._timeout, allow_redirects=False)
        except requests.RequestException as error:
            reason = str(getattr(error.args[0], "reason", error) if error.args else error)
            raise RunError(
                Cause.ENDPOINT_UNAVAILABLE,
                f"{self.url} did not answer: {reason[:300]}. Check its address and network policies, or raise "
                "rlaif.judge.timeout and max_retries. What was answered is kept.",
            ) from error
        if response.status_code != 200:
            raise self._refusal(response)
        retries = getattr(response.raw, "retries", None)
        try:
            document = response.json()
            text = document["choices"][0]["message"].get("content") or ""
            tokens = int((document.get("usage") or {}).get("total_tokens") or 0)
            return Reply(str(text), tokens, len(retries.history) if retries is not None else 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{self.url} does not answer as OpenAI's chat completions do: {response.text[:200]!r}. Accepted: the "
                "base URL of a compatible API, such as https://api.openai.com/v1 or http://vllm:8000/v1.",
            ) from error

    def _refusal(self, response: requests.Response) -> Exception:
        status, said = response.status_code, _said(response)
        if status in (401, 403):
            return RunError(
                Cause.ACCESS_DENIED,
                f"{self.url} refused the key ({status}: {said}). Put {ENV_KEY} into a Secret and name it in "
                "spec.credentials.secretName (with finetune run: into the environment).",
            )
        if status in PASSING:
            return RunError(
                Cause.ENDPOINT_UNAVAILABLE,
                f"{self.url} answered {status} to every try ({said}). Lower rlaif.judge.max_concurrency, or raise "
                "max_retries. What was answered is kept.",
            )
        if status == 404 or status < 400:
            return RunError(
                Cause.INVALID_CONFIGURATION,
                f"{self.url} answered {status} ({said}). Correct rlaif.judge.endpoint (a base URL, to which "
                "/chat/completions is added) or rlaif.judge.model.",
            )
        return RequestRefusedError(f"{status}: {said}")


def _said(response: requests.Response) -> str:
    try:
        error = response.json()["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = response.text or response.reason or ""
    return " ".join(text.split())[:300]
