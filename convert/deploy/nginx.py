"""nginx in front of the replicas: the one with the fewest requests gets the next.

A request whose replica breaks before it answered anything is asked of another one, once; a started
answer never is. Answers stream unbuffered. Paths that change a server's models are closed.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Ollama's paths that would change its store or reach out to a registry.
_CLOSED = "pull|push|create|copy|delete|blobs"
LISTEN = 8080


def nginx_conf(servers: Sequence[str], listen: str = str(LISTEN)) -> str:
    """Return a complete nginx.conf.

    Args:
        servers: ``host:port`` of every replica.
        listen: ``port`` or ``address:port``.
    """
    upstream = "\n".join(f"        server {s} max_fails=1 fail_timeout=5s;" for s in servers)
    return f"""worker_processes auto;

events {{
    worker_connections 4096;
}}

http {{
    access_log off;
    server_tokens off;

    upstream replicas {{
        zone replicas 64k;  # so that all worker processes count together
        least_conn;
{upstream}
        keepalive 32;
    }}

    server {{
        listen {listen};
        client_max_body_size 64m;

        location = /balancer {{
            default_type text/plain;
            return 200 "ok\\n";
        }}

        location ~ ^/api/({_CLOSED}) {{
            return 403;
        }}

        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_buffering off;
            proxy_connect_timeout 2s;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
            proxy_next_upstream error http_503 non_idempotent;
            proxy_next_upstream_tries 2;
            add_header X-Replica $upstream_addr always;
        }}
    }}
}}
"""
