# trip-serve on CPUs: docker build -t trip-serve . ; compose.yaml runs it. The bundle is mounted at /bundle.
FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY requirements/constraints.txt requirements/
COPY trip_rt trip_rt
RUN python -m venv /opt/trip \
    && /opt/trip/bin/pip install --only-binary :all: -c requirements/constraints.txt '.[serve]' \
    && /opt/trip/bin/pip uninstall --yes pip

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin trip && install -d -m 700 -o trip /data
COPY --from=build /opt/trip /opt/trip
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["/opt/trip/bin/python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["/opt/trip/bin/trip-serve", "--host", "0.0.0.0", "--data", "/data"]
CMD ["/bundle"]
