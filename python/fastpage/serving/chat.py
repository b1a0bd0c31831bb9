"""fastpage-chat: talk to a server, one message or a conversation."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from fastpage.serving.argument_parser import OneLineParser
from fastpage.serving.security import read_text
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

PROGRAM = "fastpage-chat"
Metadata = tuple[tuple[str, str], ...]

_HELP = "Ctrl-C stops an answer, /new starts over, /quit or Ctrl-D ends."


@dataclass
class Answer:
    text: str = ""
    usage: pb.Usage | None = None
    seconds: float = 0.0
    seconds_to_first: float | None = None
    interrupted: bool = False


class Conversation:
    def __init__(
        self,
        stub: pb_grpc.FastpageStub,
        system: str | None,
        sampling: pb.SamplingParams,
        metadata: Metadata = (),
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._sampling = sampling
        self._system = system
        self.messages: list[pb.ChatMessage] = []
        self.start_over()

    def start_over(self) -> None:
        self.messages = []
        if self._system:
            self.messages.append(pb.ChatMessage(role="system", content=self._system))

    def ask(self, text: str) -> Answer:
        """Prints the answer as it comes. A KeyboardInterrupt stops it; what came by then counts."""
        self.messages.append(pb.ChatMessage(role="user", content=text))
        answer = Answer()
        start = time.monotonic()
        call = self._stub.Chat(
            pb.ChatRequest(messages=self.messages, sampling_params=self._sampling),
            metadata=self._metadata,
        )
        try:
            for response in call:
                if answer.seconds_to_first is None:
                    answer.seconds_to_first = time.monotonic() - start
                for delta in response.outputs:
                    answer.text += delta.text
                    print(delta.text, end="", flush=True)
                if response.HasField("usage"):
                    answer.usage = response.usage
        except KeyboardInterrupt:
            call.cancel()
            answer.interrupted = True
        except grpc.RpcError:
            self.messages.pop()
            raise
        print()
        answer.seconds = time.monotonic() - start
        self.messages.append(pb.ChatMessage(role="assistant", content=answer.text))
        return answer


def main() -> None:
    options = _parse_args()
    sampling = pb.SamplingParams()
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        value = getattr(options, name)
        if value is not None:
            try:
                setattr(sampling, name, value)
            except ValueError:
                option = "--" + name.replace("_", "-")
                sys.exit(f"{PROGRAM}: error: {option} {value} is out of range")
    with _channel(options) as channel:
        try:
            stub = pb_grpc.FastpageStub(channel)
            conversation = Conversation(stub, options.system, sampling, _metadata(options))
            message = " ".join(options.message)
            if not message and not sys.stdin.isatty():
                message = sys.stdin.read().strip()
            if message:
                _report(conversation.ask(message), options.verbose)
            else:
                _talk(conversation, options.verbose)
        except grpc.RpcError as error:
            sys.exit(_one_line(error, options.address))
        except UnicodeEncodeError:
            sys.exit(f"{PROGRAM}: error: the message is not valid UTF-8")
        except BrokenPipeError:
            # Whoever read the answer has gone; the interpreter would flush once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt:
            print()


def _channel(options: argparse.Namespace) -> grpc.Channel:
    if options.tls_ca is None:
        return grpc.insecure_channel(options.address)
    roots = _read("--tls-ca", options.tls_ca).encode()
    return grpc.secure_channel(options.address, grpc.ssl_channel_credentials(roots))


def _metadata(options: argparse.Namespace) -> Metadata:
    if options.auth_token_file is None:
        return ()
    text = _read("--auth-token-file", options.auth_token_file).strip()
    if not text:
        sys.exit(
            f"{PROGRAM}: error: --auth-token-file {options.auth_token_file} has no token in it"
        )
    return (("authorization", f"Bearer {text.splitlines()[0].strip()}"),)


def _read(option: str, path: str) -> str:
    try:
        return read_text(option, Path(path))
    except ValueError as error:
        sys.exit(f"{PROGRAM}: error: {error}")


def _talk(conversation: Conversation, verbose: bool) -> None:
    import readline  # noqa: F401  (line editing and history for input())

    print(_HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            conversation.start_over()
        elif line:
            try:
                _report(conversation.ask(line), verbose)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                print(f"{PROGRAM}: {error.details()}", file=sys.stderr)


def _report(answer: Answer, verbose: bool) -> None:
    if not verbose:
        return
    if answer.usage is None:
        line = f"stopped after {answer.seconds:.1f} s"
    else:
        usage = answer.usage
        rate = usage.completion_tokens / max(answer.seconds, 1e-6)
        line = (
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
            f"{usage.completion_tokens} in {answer.seconds:.1f} s ({rate:.1f} tokens/s)"
        )
    if answer.seconds_to_first is not None:
        line += f", first after {answer.seconds_to_first * 1000:.0f} ms"
    print(f"[{line}]", file=sys.stderr)


def _one_line(error: grpc.RpcError, address: str) -> str:
    details = " ".join((error.details() or "").split())
    if error.code() == grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return f"{PROGRAM}: error: no server answers at {address} (start one with fastpage-grpc)"
    return f"{PROGRAM}: error: {details} ({error.code().name})"


def _parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog=PROGRAM, description="Talk to a fastpage-grpc server.", epilog=_HELP
    )
    parser.add_argument("message", nargs="*", help="one message; none: a conversation")
    parser.add_argument(
        "--address",
        default="127.0.0.1:50051",
        metavar="HOST:PORT|unix:PATH",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="use TLS, and trust whom these certificates vouch for"
    )
    parser.add_argument(
        "--auth-token-file", metavar="FILE", help="the first line is the server's token"
    )
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--verbose", action="store_true", help="print usage and times")
    return parser.parse_args()


if __name__ == "__main__":
    main()
