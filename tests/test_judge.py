"""The judge of video answers: what it is asked, what replies mean, and going on after whatever went wrong."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval.run import judge, judging, predictions
from eval.run.judging import RUBRIC, Judge, JudgeFailed, Verdict, parse

YES, NO = Verdict(True, 4), Verdict(False, 0)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"pred": "yes", "score": 4}', YES),
        ('{"score": 0, "pred": "No"}', NO),
        ("{'pred': 'yes', 'score': 4}", YES),
        ("```json\n{'pred': 'no', 'score': 0}\n```", NO),
        ('Sure! Here it is: {"pred": "yes", "score": "4"} I hope it helps.', YES),
        ('{"pred": "yes", "score": 4}\n{"pred": "yes", "score": 4}', YES),
        ('{"pred": "yes", "score": 4, "reason": "same thing"}', YES),
        ("{pred: 'yes', score: 4}", YES),
        ('{"pred": "yes", "score": 4.5}', Verdict(True, 4.5)),
        ('{"pred": "yes", "score": 4} or {"pred": "no", "score": 0}', None),
        ('{"pred": "yes", "pred": "no", "score": 0}', None),
        ('{"pred": "maybe", "score": 4}', None),
        ('{"pred": "yes"}', None),
        ('{"pred": "yes", "score": 6}', None),
        ('{"pred": "yes", "score": -1}', None),
        ('{"pred": "yes", "score": 55}', None),
        ("{'pred': 'yes', 'score': 45}", None),
        ('{"pred": "yes", "score": true}', None),
        ('{"pred": "yes", "score": NaN}', None),
        ('{"pred": true, "score": 4}', None),
        ("yes, 4", None),
        ("", None),
        ("__import__('os').abort()", None),
        ("{'pred': __import__('os').abort(), 'score': 4}", None),
        ("{" * 10000, None),
    ],
)
def test_replies_are_read_as_data(reply, verdict):
    assert parse(reply) == verdict


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible address that says what a function of the prompt and the number of the request says."""

    daemon_threads = True

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.requests, self.lock = say, [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            said = self.server.say(body["messages"][0]["content"], len(self.server.requests))
        status, said = said if isinstance(said, tuple) else (200, said)
        reply = {"model": "a-judge-0613", "choices": [{"message": {"role": "assistant", "content": said}}]}
        content = said if isinstance(said, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    made = []
    monkeypatch.setattr(judging, "LONGEST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    monkeypatch.setenv("no_proxy", "*")

    def start(say):
        made.append(Server(say))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


def right(prompt: str, _: int = 0) -> str:
    """Right where the system's answer is the correct one."""
    wanted, said = (prompt.split(f"{name}: ")[1].split("\n")[0] for name in ("Correct answer", "System's answer"))
    return json.dumps({"pred": "yes" if wanted == said else "no", "score": 5 if wanted == said else 1})


@pytest.fixture
def file(tmp_path):
    """Six predictions, the even ones right."""
    file = tmp_path / "out" / "predictions" / "msvd_qa" / "vanilla-1.jsonl"
    file.parent.mkdir(parents=True)
    write(file, ["dog", "cat", "dog", "{answer}", "dog", 'ein Hund\n"}'])
    return file


def write(file, answers):
    lines = [{"id": n, "question": f"what {n}?", "answer": "dog", "pred": pred} for n, pred in enumerate(answers)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(server, *arguments) -> int:
    return judge.main([*map(str, arguments), "--model", "a-judge", "--base-url", server.address, "--parallel", "2"])


def summary(file) -> dict:
    return json.loads(file.with_name("vanilla-1.a-judge.judged.json").read_text())


def verdicts(file):
    return file.with_name("vanilla-1.a-judge.judged.jsonl")


def test_accuracy_and_mean_score_of_a_folder(server, file, capsys):
    running = server(right)
    assert run(running, file.parents[2]) == 0
    found = summary(file)
    assert (found["n"], found["unparsable"], found["accuracy"], found["score"]) == (6, 0, 0.5, 3.0)
    assert found["models"] == ["a-judge-0613"] and found["ci95"][0] < 0.5 < found["ci95"][1]
    assert "50.0 (" in capsys.readouterr().out
    path, headers, body = running.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer a-secret"
    assert body["model"] == "a-judge" and body["temperature"] == 0
    assert any("System's answer: {answer}\n" in one["messages"][0]["content"] for *_, one in running.requests)
    assert not any("a-secret" in one.read_text() for one in file.parent.iterdir())


def test_the_same_command_asks_only_what_is_missing(server, file, caplog):
    running = server(right)
    assert run(running, file) == 0 and len(running.requests) == 6
    assert run(running, file) == 0 and len(running.requests) == 6
    lines = verdicts(file).read_text().splitlines()
    verdicts(file).write_text("\n".join([*lines[:3], lines[3][:20], '{"key": 1}', *lines[5:]])[:-10])
    assert run(running, file) == 0
    assert len(running.requests) == 9 and "line 4 is damaged; its question is asked again" in caplog.text
    assert (summary(file)["n"], summary(file)["accuracy"]) == (6, 0.5)
    write(file, ["dog"] * 6)
    assert run(running, file) == 0
    assert len(running.requests) == 12 and summary(file)["accuracy"] == 1


def test_unparsable_replies_are_counted_and_asked_again_when_wanted(server, file, capsys):
    running = server(lambda prompt, number: "I cannot say" if "what 1?" in prompt else right(prompt))
    assert run(running, file) == 0
    found = summary(file)
    assert (found["n"], found["unparsable"], found["accuracy"]) == (6, 1, 0.6)
    assert "parsable reply" in capsys.readouterr().out
    assert run(running, file) == 0 and len(running.requests) == 6
    running.say = right
    assert run(running, file, "--again") == 0 and len(running.requests) == 7
    assert (summary(file)["unparsable"], summary(file)["accuracy"]) == (0, 0.5)


def test_a_busy_judge_is_tried_again(server, file):
    running = server(lambda prompt, number: (429, b"busy") if number % 2 else right(prompt))
    assert run(running, file, "--tries", 20) == 0
    assert summary(file)["accuracy"] == 0.5 and len(running.requests) > 6


@pytest.mark.parametrize(
    ("answer", "words", "requests"),
    [
        ((401, b'{"error": {"message": "wrong key"}}'), "HTTP status 401: wrong key", 2),
        ((503, b"down"), "failed 3 times .HTTP status 503: down.; the same command goes on", 6),
        ((200, b"<html>"), "is no OpenAI-compatible address: <html>", 2),
        ((404, b""), "HTTP status 404: no content", 2),
    ],
)
def test_a_judge_that_cannot_be_had_is_one_line(server, file, capsys, answer, words, requests):
    running = server(lambda *_: answer)
    assert run(running, file, "--tries", 3) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(words, said) and len(running.requests) <= requests
    running.say = right
    assert run(running, file) == 0 and summary(file)["n"] == 6


def test_what_was_judged_before_a_failure_stays(server, file):
    running = server(lambda prompt, number: right(prompt) if number <= 3 else (400, b"no"))
    assert run(running, file, "--tries", 1) == 2
    kept = len(judge.read_verdicts(verdicts(file)))
    assert 1 <= kept <= 3
    running.say, before = right, len(running.requests)
    assert run(running, file) == 0 and len(running.requests) == before + 6 - kept


def test_nobody_listens(tmp_path, file):
    lonely = Judge("http://127.0.0.1:9/v1", "x", tries=2, pause=0.001)
    with pytest.raises(JudgeFailed, match="failed 2 times .ConnectionError"):
        lonely.ask(predictions.read(file)[0])


def test_wrong_arguments_are_one_line(file, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "question": "q", "answer": "a"}\n')
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "question": "q", "answer": "a", "pred": "p"}\n' * 2)
    (tmp_path / "prompt.txt").write_text("{question} {answer}")
    local = ["--model", "x", "--base-url", "http://127.0.0.1:9"]
    for arguments, words in (
        ([file, "--model", "x"], "OPENAI_API_KEY: not set"),
        ([file, "--model", "x", "--base-url", "localhost:8000"], "--base-url: got 'localhost:8000'"),
        ([tmp_path / "none.jsonl", *local], "cannot be read"),
        ([tmp_path, *local], "holds no predictions"),
        ([tmp_path / "bad.jsonl", *local], "line 1 is no JSON object with id, question, answer, pred"),
        ([tmp_path / "twice.jsonl", *local], "line 2: id '1' is there twice"),
        ([file, *local, "--prompt", tmp_path / "prompt.txt"], "--prompt: lacks {pred}"),
        ([file, *local, "--parallel", "0"], "--parallel: got '0'"),
    ):
        assert judge.main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        judge.main(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("OPENAI_API_KEY", "--base-url", "unparsable", "not comparable"))
    assert all("{" + name + "}" in RUBRIC for name in ("question", "answer", "pred"))
