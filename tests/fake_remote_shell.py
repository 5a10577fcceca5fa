"""A fake of ssh and sshd for tests: the command runs on this machine, but as a child of another process than the caller's.

``python fake_remote_shell.py serve SOCKET`` is the daemon of the "other machine"; ``python fake_remote_shell.py SOCKET HOST
COMMAND...`` the client. As with ssh, the command's standard input ends when the client ends, however it ends.
"""

import os
import socket
import subprocess
import sys
import threading


def serve(address: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        size = int(connection.recv(8))
        command = connection.recv(size, socket.MSG_WAITALL).decode()
        subprocess.Popen(
            ["sh", "-c", command], stdin=connection, stdout=connection, stderr=connection, start_new_session=True
        )
        connection.close()


def call(address: str, host: str, words: list[str]) -> None:
    if host == "unreachable":
        sys.exit("fake: could not resolve hostname unreachable")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    command = " ".join(words).encode()
    connection.sendall(f"{len(command):8}".encode() + command)

    def send() -> None:
        while data := os.read(0, 65536):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    while data := connection.recv(65536):
        os.write(1, data)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        call(sys.argv[1], sys.argv[2], sys.argv[3:])
