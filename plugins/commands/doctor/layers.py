"""Who stands between, as far as a reply's headers say so, and how each is told not to hold a stream back.

What it is: tables of programs and services by the headers that they leave, and the lines of configuration that matter.
What it does not know: whether anything was held back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SERVERS = (
    ("cloudflare", "Cloudflare"),
    ("nginx", "nginx"),
    ("openresty", "nginx"),
    ("tengine", "nginx"),
    ("caddy", "Caddy"),
    ("apache", "Apache httpd"),
    ("envoy", "Envoy"),
    ("istio-envoy", "Envoy"),
    ("awselb", "AWS load balancer"),
    ("cloudfront", "CloudFront"),
    ("akamai", "Akamai"),
    ("microsoft-iis", "IIS"),
    ("microsoft-azure-application-gateway", "Azure Application Gateway"),
    ("litespeed", "LiteSpeed"),
    ("squid", "Squid"),
    ("varnish", "Varnish"),
    ("gws", "Google front end"),
    ("google frontend", "Google front end"),
)
"""What the header `server` begins with. Penstock sends none."""
_HEADERS = (
    ("cf-ray", "Cloudflare"),
    ("x-amz-cf-id", "CloudFront"),
    ("x-fastly-request-id", "Fastly"),
    ("x-azure-ref", "Azure Front Door"),
    ("x-varnish", "Varnish"),
    ("x-envoy-upstream-service-time", "Envoy"),
    ("x-kong-proxy-latency", "Kong"),
    ("fly-request-id", "Fly.io proxy"),
    ("x-vercel-id", "Vercel"),
    ("x-akamai-transformed", "Akamai"),
    ("ngrok-agent-ips", "ngrok"),
)
_VIA = (
    ("cloudfront", "CloudFront"),
    ("varnish", "Varnish"),
    ("squid", "Squid"),
    ("caddy", "Caddy"),
    ("google", "Google front end"),
    ("kong", "Kong"),
)
CACHES = ("x-cache", "cf-cache-status", "age")
"""Headers of who keeps copies."""


def layers_of(headers: Mapping[str, str]) -> list[str]:
    """Names, each once, with the version where it is told."""
    found: dict[str, str] = {}
    for name, layer in _HEADERS:
        if name in headers:
            found[layer] = layer
    for part in headers.get("via", "").lower().split(","):
        words = part.split()
        if len(words) >= 2:
            known = next((layer for word, layer in _VIA if word in part), "")
            found.setdefault(known or words[1], known or f"via {words[1]}")
    server = headers.get("server", "")
    if server:
        layer = next((layer for word, layer in _SERVERS if server.lower().startswith(word)), "")
        version = re.search(r"/[\d.]+", server)
        found[layer or server] = (layer or server) + (version.group() if layer and version else "")
    return list(found.values())


def unbuffer(layers: list[str], *, said_no: bool) -> list[str]:
    """How to tell them not to hold events back. `said_no`: the server's own replies have X-Accel-Buffering: no."""
    lines: list[str] = []
    for layer in layers:
        name = layer.partition("/")[0]
        if name == "nginx" and said_no:
            lines.append(
                "nginx: take X-Accel-Buffering out of proxy_ignore_headers (the server sends 'no', which nginx obeys unless told not to), or say so itself:"
            )
        lines += _UNBUFFER.get(name, [f"{name}: switch response buffering and compression of text/event-stream off."])
    return lines or [
        "Nothing in the reply's headers says who it is. Ask each layer itself, from the inside out (--direct names the server): the first",
        "address at which this appears is the one. nginx: proxy_buffering off;   Apache: flushpackets=on   Traefik, Caddy, HAProxy do not buffer by themselves.",
    ]


_UNBUFFER = {
    "nginx": ["  proxy_buffering off;", "  gzip off;", "  proxy_cache off;"],
    "Apache httpd": [
        "Apache httpd: ProxyPass / http://127.0.0.1:8000/ flushpackets=on",
        "  SetEnvIf Request_URI ^/v1/ no-gzip=1",
    ],
    "Caddy": ["Caddy: reverse_proxy 127.0.0.1:8000 { flush_interval -1 }, and no `encode` for text/event-stream."],
    "Envoy": ["Envoy: no buffer filter (envoy.filters.http.buffer) and no compressor for text/event-stream on this route."],
    "Cloudflare": [
        "Cloudflare: passes event streams on as they come unless something must see the whole body: on this host name switch off what rewrites or",
        "  compresses bodies (Email obfuscation, Rocket Loader, response transforms, Workers that await the text), and bypass the cache.",
    ],
    "CloudFront": ["CloudFront: a behaviour for /v1/* with caching and 'Compress objects automatically' off."],
    "Fastly": ["Fastly: set beresp.do_stream = true; set beresp.do_esi = false; and no gzip for text/event-stream."],
    "Varnish": ["Varnish: set beresp.do_stream = true; set beresp.do_gzip = false; or return (pipe) for /v1/."],
    "IIS": ['IIS (ARR): <proxy responseBufferLimit="0" />, and no dynamic compression of text/event-stream.'],
    "Azure Application Gateway": ["Azure Application Gateway: switch 'response buffer' off."],
    "Kong": ["Kong: on the route, response_buffering: false."],
    "Squid": [
        "Squid: it should not stand before a server of streams; if it must, `cache deny` and no adaptation (ICAP, eCAP) for this host."
    ],
}
