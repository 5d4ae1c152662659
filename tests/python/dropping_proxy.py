"""A TCP proxy that can drop its connections: a network that fails."""

import socket
import threading


class DroppingProxy:
    def __init__(self, target):
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._pairs = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.refuse = False
        self.limit_bytes = None  # per direction and connection; then it is dropped
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if self.refuse:
                near.close()
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            threading.Thread(target=self._copy, args=(near, far, self.limit_bytes), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, None), daemon=True).start()

    def _copy(self, source, sink, limit):
        sent = 0
        try:
            while data := source.recv(65536):
                sink.sendall(data)
                sent += len(data)
                if limit is not None and sent > limit:
                    break
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    @property
    def connections(self):
        return len(self._pairs)

    def drop(self):
        """Drops every connection there is."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        return len(pairs)

    def close(self):
        self._server.close()
        self.drop()
