"""Google Cloud Storage in memory: its JSON interface, as far as gcsfs and tensorstore use it here."""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_BUCKET = r"(?:/(?:upload|download))?/storage/v1/b/([^/]+)"


class Store(ThreadingHTTPServer):
    """objects: (bytes, generation, when it was written) by name; of one bucket."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.objects, self.lock, self.numbers = {}, threading.RLock(), itertools.count(1)
        self.uploads = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self):
        """With which gcsfs and tensorstore come here."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        }

    def handle_error(self, request, client_address):
        """A client that was killed."""

    def write(self, name, data):
        self.objects[name] = data, next(self.numbers), time.time()

    def facts(self, name):
        data, generation, written = self.objects[name]
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(written))
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": moment,
            "timeCreated": moment,
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def serve(self):
        url = urllib.parse.urlparse(self.path)
        options = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock, contextlib.suppress(ConnectionError):
            if re.fullmatch(f"{_BUCKET}", url.path):
                self.answer(200, {"kind": "storage#bucket", "name": "bucket"})
            elif re.fullmatch(f"{_BUCKET}/o/?", url.path):
                self.upload(options, body) if "uploadType" in options else self.list(options)
            elif found := re.fullmatch(
                f"{_BUCKET}/o/(.+)/(?:rewriteTo/b/[^/]+|copyTo/b/[^/]+|moveTo)/o/(.+)", url.path
            ):
                self.copy(*map(urllib.parse.unquote, found.groups()[1:]), moves="/moveTo/" in url.path)
            elif found := re.fullmatch(f"{_BUCKET}/o/(.+)", url.path):
                self.one(urllib.parse.unquote(found[2]), options)
            else:
                self.answer(404, {"error": {"code": 404, "message": url.path}})

    do_GET = do_POST = do_PUT = do_DELETE = serve

    def upload(self, options, body):
        name = options.get("name")
        if options["uploadType"] == "multipart":
            boundary = self.headers["Content-Type"].split("boundary=")[1].strip("\"'").encode()
            parts = body.split(b"--" + boundary)[1:3]
            facts, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            name, body = json.loads(facts)["name"], re.sub(rb"\r?\n$", b"", data)
        elif options["uploadType"] == "resumable":
            if "upload_id" not in options:
                number = str(next(self.server.numbers))
                self.server.uploads[number] = [name or json.loads(body)["name"], b"", options]
                self.answer(200, Location=f"http://{self.headers['Host']}{self.path}&upload_id={number}")
                return
            upload = self.server.uploads[options["upload_id"]]
            upload[1] += body
            if self.headers.get("Content-Range", "").endswith("/*"):
                self.answer(308, Range=f"bytes=0-{len(upload[1]) - 1}")
                return
            name, body, options = upload
        if int(options.get("ifGenerationMatch", self.generation(name))) != self.generation(name):
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            return
        self.server.write(name, body)
        self.answer(200, self.server.facts(name))

    def generation(self, name):
        return self.server.objects[name][1] if name in self.server.objects else 0

    def list(self, options):
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter")
        first, end = options.get("startOffset", ""), options.get("endOffset", "\U0010ffff")
        names = [name for name in sorted(self.server.objects) if name.startswith(prefix) and first <= name < end]
        below = {name for name in names if delimiter and delimiter in name.removeprefix(prefix)}
        folders = {prefix + name.removeprefix(prefix).split(delimiter)[0] + delimiter for name in below}
        items = [self.server.facts(name) for name in names if name not in below]
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def copy(self, name, other, moves):
        if name not in self.server.objects:
            self.answer(404, {"error": {"code": 404, "message": name}})
            return
        self.server.write(other, self.server.objects[name][0])
        if moves:
            del self.server.objects[name]
        facts = self.server.facts(other)
        self.answer(200, {"done": True, "resource": facts, **facts})

    def one(self, name, options):
        if name not in self.server.objects:
            self.answer(404, {"error": {"code": 404, "message": name}})
        elif self.command == "DELETE":
            del self.server.objects[name]
            self.answer(204)
        elif options.get("alt") != "media":
            self.answer(200, self.server.facts(name))
        elif int(options.get("ifGenerationMatch", self.generation(name))) != self.generation(name):
            self.answer(412)
        elif options.get("ifGenerationNotMatch") == str(self.generation(name)):
            self.answer(304)
        else:
            data, headers = self.server.objects[name][0], {"x_goog_generation": str(self.generation(name))}
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if not asked:
                self.answer(200, data, **headers)
                return
            first = int(asked[1]) if asked[1] else len(data) - int(asked[2])
            last = min(int(asked[2]) if asked[1] and asked[2] else len(data), len(data) - 1)
            if first >= len(data):
                self.answer(416)
                return
            self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)
