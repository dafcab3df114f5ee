"""One run per folder: a lock that the kernel gives back when its process ends, however it ends."""

import fcntl
import os
import pathlib
import socket


class Lock:
    """A lock on a file, which says who holds it, or held it last.

    Args:
        path: of the file, in a folder that is there when the lock is taken.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock, unless this object has it already.

        Raises:
            ValueError: another process has it; it is named.
            OSError: the file cannot be written.
        """
        if self._file is not None:
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not of the process but of the opened file: a second run of one process is refused too.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ValueError(
                f"{self.path.parent} is in use by {holder}; wait for its end, or name another "
                "--workdir"
            ) from error
        except OSError as error:  # a file system that knows no locks
            print(f"{self.path} cannot be locked ({error.strerror}); start no second run there")
        self._file = file
        holder = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
        if os.pread(file, 1000, 0) != holder:
            os.ftruncate(file, 0)
            os.pwrite(file, holder, 0)

    def release(self) -> None:
        """Give the lock back; the file stays, for others may have it open."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.release()
