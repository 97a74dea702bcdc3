# The gateway as a small image: Python's slim one, the locked dependencies, gateway.py as bytecode, an unprivileged user.
#   docker build -t claude-gateway .        or deploy/build.sh --test, which also tries what it built

# The base; a digest may stand behind the tag (3.13-slim@sha256:…).
ARG PYTHON=3.13-slim

FROM python:${PYTHON} AS python

FROM python AS build
# hadolint ignore=DL3008 # binutils never leaves this stage: any version strips
RUN apt-get update && apt-get install -y --no-install-recommends binutils
WORKDIR /app
COPY requirements.txt ./
# Wheels alone, each with its hash, into an environment that has no pip.
RUN python -m venv --without-pip venv \
 && pip --python venv/bin/python install --no-cache-dir --no-compile --only-binary :all: --require-hashes -r requirements.txt
COPY --chmod=0644 gateway.py config.example.yaml ./
# No image of packages that bring what runs at every start of Python, or what their RECORD does not list.
RUN venv/bin/python -B gateway.py check --integrity && rm requirements.txt
# Debugging symbols (uvloop's are 14 of its 16 MB), tests and the sources of compiled modules are not needed to run.
RUN find venv -name '*.so' -exec strip --strip-unneeded {} + \
 && find venv -type d \( -name test -o -name tests \) -prune -exec rm -r {} + \
 && find venv -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' -o -name '*.[ch]' \) -delete
COPY --chmod=0755 deploy/claude-gateway venv/bin/
# As pip would lay it.
RUN mv gateway.py venv/lib/python3.*/site-packages/

# The base without what installs more: 8 MB less, and nothing in it that scanners find and nobody runs. Done on a copy, whose
# times stay what they were: so it is the same layer in every build on the same base, and an upgrade is a small download.
FROM python AS base
# hadolint ignore=DL3067 # only what lies elsewhere is not touched by a RUN
COPY --from=python / /base
RUN pip=/base$(python -c 'import pip; print(pip.__path__[0])') \
 && wheels=/base$(python -c 'import ensurepip; print(ensurepip.__path__[0])') \
 && rm -r "$pip" "$pip"-*.dist-info "$wheels" /base/usr/local/bin/pip* \
 && touch -r /base/etc/os-release "${pip%/*}" "${wheels%/*}" /base/usr/local/bin

FROM scratch
COPY --from=base /base /
ARG SOURCE=https://github.com/OWNER/claude-gateway
LABEL org.opencontainers.image.title="claude-gateway" \
      org.opencontainers.image.description="A self-hosted gateway for Claude Code: one Python file, one config.yaml, usage in JSONL" \
      org.opencontainers.image.source="${SOURCE}"
# The MALLOC_ two have glibc give freed memory back: without them 955 MB stayed after a load of large requests, with them 63.
ENV PATH=/app/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    MALLOC_ARENA_MAX=2 \
    GATEWAY_CONFIG=/data/config.yaml \
    GATEWAY_HOST=0.0.0.0 \
    GATEWAY_PORT=8000
WORKDIR /app
COPY --from=build /app /app
# A read-only root keeps no bytecode, and Python's own modules come without: what the gateway imports is compiled now, and
# never later, because the list of all files that Python may import would not have it (`check --integrity`). Python's own
# modules are below /usr/local in the official images, and elsewhere in others.
# /data is anybody's, so that a new volume works for every --user; nobody else is in here.
# hadolint ignore=SC2086
RUN python -c 'import gateway, cryptography.fernet, prometheus_client, uvloop' && mkdir -m 0777 /data \
 && others=$(python -c 'import os, sys; print(*(p for p in sys.path if os.path.isdir(p) and not p.startswith(("/app", "/usr/local"))))') \
 && find /app /usr/local/bin /usr/local/lib $others -xtype f -exec sha256sum {} + >/tmp/gateway.sha256 \
 && mv /tmp/gateway.sha256 /app/venv/lib/python3.*/site-packages/ \
 && PYTHONDONTWRITEBYTECODE=1 claude-gateway check --integrity
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /data
EXPOSE 8000
# Asks /livez, because a restart helps none of what /health looks at, as the lightest Python can: no site, no socket
# module (10 ms of CPU instead of 300).
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python3", "-I", "-S", "-c", \
  "import _socket, posix; \
env = lambda name, default: posix.environ.get(name, default).decode(); \
host = env(b'GATEWAY_HOST', b'127.0.0.1'); \
asked = _socket.socket(10 if ':' in host else 2, 1); \
asked.settimeout(4); \
asked.connect((host, int(env(b'GATEWAY_PORT', b'8000')))); \
asked.send(b'GET /livez HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n'); \
raise SystemExit(asked.recv(12)[9:] != b'200')"]
ENTRYPOINT ["claude-gateway"]
