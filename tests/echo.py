"""Echo server and client on `wire.Connection`, for the Autobahn test suite.

    python echo.py server PORT              serves on 127.0.0.1 until interrupted
    python echo.py client BASE AGENT COUNT  runs the cases 1..COUNT of a fuzzing server
"""
from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wire import (  # noqa: E402
    READ_BYTES, Connection, HttpError, ProtocolError, Tap, connect, error_response, hang_up, read_request, serve)

MAX_MESSAGE = 16 * 1024 * 1024      # the largest message of Autobahn's section 9


def echo(connection: Connection, messages: list[str | bytes]) -> None:
    """Send each message back as it came, text as text, binary as binary."""
    for message in messages:
        if isinstance(message, str):
            connection.send(message)
        else:
            connection.write(connection.ws.binary(message))


async def serve_one(reader: Tap, writer: asyncio.StreamWriter) -> None:
    """The server's side, which reads as the broker does."""
    try:
        request = await read_request(reader)
        if request is not None:
            connection = Connection.accept(request, reader, writer, max_message=MAX_MESSAGE)
            await connection.pump(lambda messages: (echo(connection, messages), connection.hold(READ_BYTES)))
            return await connection.close()
    except HttpError as error:
        writer.write(error_response(error))
    await hang_up(reader, writer)


async def server(port: int) -> None:
    async with await serve(serve_one, "127.0.0.1", port) as listener:
        await listener.serve_forever()


async def client(base: str, agent: str, count: int) -> None:
    for case in range(1, count + 1):
        try:
            connection = await connect(f"{base}/runCase?case={case}&agent={agent}", max_message=MAX_MESSAGE)
            while (messages := await connection.receive()) is not None:
                echo(connection, messages)
                await connection.drain()
            await connection.close()
        except (OSError, ProtocolError) as error:       # the suite breaks connections on purpose
            print(f"case {case}: {error}", file=sys.stderr)


def main(args: list[str]) -> int:
    if len(args) == 2 and args[0] == "server":
        coroutine = server(int(args[1]))
    elif len(args) == 4 and args[0] == "client":
        coroutine = client(args[1], args[2], int(args[3]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        asyncio.run(coroutine)
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
