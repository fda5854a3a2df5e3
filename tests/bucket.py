"""A bucket on this machine: its fixture for tests of `gs://` paths over HTTP."""

import socket

import pytest

pytest.importorskip("gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server")
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """An empty bucket that this process serves; yields the lines of its log."""
    lines = []
    monkeypatch.setattr(
        server.RequestHandler, "log_message", lambda self, form, *rest: lines.append(form % rest)
    )
    # Google says which version of an object it sends, and TensorStore insists on that.
    download = objects.download

    def with_generation(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        if response.status < 300:
            names = (request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]

    monkeypatch.setattr(objects, "download", with_generation)
    # Orbax asks for many arrays at once; the emulator listens for five.
    monkeypatch.setattr(server.server.HTTPServer, "request_queue_size", 256)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    # Which kind of bucket it is would be asked of Google.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        yield lines
