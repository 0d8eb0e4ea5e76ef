# syntax=docker/dockerfile:1
# The server with everything a fleet needs. Built in one stage, run from another, as a user who may write only its data.
#
#   docker build -t oncewise .
#   docker run --rm --volume oncewise:/data oncewise keys create --org acme
#   docker run --detach --publish 8000:8000 --volume oncewise:/data --env OPENAI_API_KEY --stop-timeout 40 oncewise
#
# PYTHON may be set to an image with a digest, for builds that can be repeated to the byte.
ARG PYTHON=python:3.11-slim-trixie

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.lock locks/
COPY deploy/requirements.lock locks/runtime.lock
# What builds the package comes from the lock as well, by its hashes.
RUN python -m venv tools \
 && sed -n -E '/^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/,/[^\\]$/p' locks/requirements.lock > locks/tools.lock \
 && tools/bin/pip install --require-hashes --requirement locks/tools.lock
RUN python -m venv /opt/oncewise \
 && /opt/oncewise/bin/pip install --require-hashes --requirement locks/runtime.lock
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN tools/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir wheels . \
 && /opt/oncewise/bin/pip install --no-deps --no-index wheels/*.whl \
 && /opt/oncewise/bin/pip uninstall --yes pip \
 && python -m compileall -q /opt/oncewise/lib

FROM ${PYTHON}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin oncewise \
 && install --directory --owner=oncewise --group=oncewise --mode=0700 /data
COPY --from=build /opt/oncewise /opt/oncewise
ENV PATH=/opt/oncewise/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ONCEWISE_HOST=0.0.0.0 \
    ONCEWISE_DATABASE_URL=sqlite:////data/oncewise.db
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Readiness, not liveness: what waits for a healthy container waits for one that takes requests.
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health/readiness' % os.environ.get('ONCEWISE_PORT', 8000), timeout=2)"]
ENTRYPOINT ["oncewise"]
CMD ["serve"]
