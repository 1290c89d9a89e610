"""The front's configuration: nginx, which lets the hospitals' path through and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sonofed_common.contract.errors import DeploymentError
from sonofed_common.runtime import write_atomically
from sonofed_server.provisioning.project import Coordinator

IDLE = ("/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat")
"""Calls that come while nothing moves; what a message holds is asked for by calls of its own."""

SBIN = ("/usr/sbin", "/usr/local/sbin")

# The path is passed on as nginx has normalised it, never as it came: a way round such as
# '/v1/control/../fleet' would otherwise be read differently behind it.
TEMPLATE = """\
# Written by 'sonofed-coordinator up'; changes are lost.
daemon off;
worker_processes auto;
pid "{run}/nginx.pid";
error_log stderr notice;

events {{
  worker_connections 1024;
}}

http {{
  # No query string, no header: nothing that a hospital sends but the path is logged.
  log_format front escape=json '{{"time":"$time_iso8601","address":"$remote_addr",'
    '"method":"$request_method",'
    '"path":"$uri","status":$status,"in":$request_length,"out":$bytes_sent,'
    '"seconds":$request_time,"tls":"$ssl_protocol"}}';
  # Hospitals ask for messages all day: without those answers a log tells what happened.
  map "$uri $status" $is_told {{
    default 1;
{idle}
  }}
  access_log "{log}" front if=$is_told;
  server_tokens off;

  client_body_temp_path "{run}/nginx";
  proxy_temp_path "{run}/nginx";
  fastcgi_temp_path "{run}/nginx";
  uwsgi_temp_path "{run}/nginx";
  scgi_temp_path "{run}/nginx";

  client_max_body_size {body}m;
  client_body_timeout 120s;
  client_header_timeout 30s;
  large_client_header_buffers 4 8k;
  limit_req_zone $binary_remote_addr zone=requests:10m rate={rate}r/s;
  limit_req_status 429;
  limit_conn_zone $binary_remote_addr zone=connections:10m;
  limit_conn_status 429;

  upstream superlink {{
    server 127.0.0.1:{superlink_port};
    keepalive 32;
  }}

  server {{
    listen {listen}:{port} ssl;
    ssl_certificate "{certificate}";
    ssl_certificate_key "{certificate}";
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
    ssl_session_tickets off;
    ssl_session_cache shared:tls:10m;

    location /v1/fleet/ {{
      limit_req zone=requests burst={burst} nodelay;
      limit_conn connections 64;
      proxy_pass https://superlink/v1/fleet/;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host localhost;
      proxy_ssl_name localhost;
      proxy_ssl_server_name on;
      proxy_ssl_trusted_certificate "{authority}";
      proxy_ssl_verify on;
      proxy_ssl_session_reuse on;
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}

    # Else nginx sends who calls it to the path with a slash.
    location = /v1/fleet {{
      return 404;
    }}

    location / {{
      return 404;
    }}
  }}
}}
"""


def find_nginx() -> str:
    """Return the path of nginx.

    Raises
    ------
    DeploymentError
        It is not installed.
    """
    found = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), *SBIN]))
    if found is None:
        raise DeploymentError(
            "nginx, the front before the SuperLink, is missing; install it, for example by "
            "'apt-get install nginx-light'"
        )
    return found


def front_file(coordinator: Coordinator) -> Path:
    """Where nginx's configuration is."""
    return coordinator.run / "nginx.conf"


def write_front(coordinator: Coordinator) -> Path:
    """Write nginx's configuration and return its path."""
    project, run = coordinator.project, coordinator.run
    # One by one: a parent that is made along with a folder is open to all.
    for folder in (run, run / "nginx"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = TEMPLATE.format(
        idle="\n".join(f'    "{path} 200" 0;' for path in IDLE),
        run=_inside_quotes(run),
        log=_inside_quotes(coordinator.front_log),
        body=project.body_megabytes,
        rate=project.requests_per_second,
        burst=10 * project.requests_per_second,
        superlink_port=project.superlink_port,
        listen=f"[{project.listen}]" if ":" in project.listen else project.listen,
        port=project.port,
        certificate=_inside_quotes(coordinator.front),
        authority=_inside_quotes(coordinator.authority),
    )
    path = front_file(coordinator)
    write_atomically(path, text.encode())
    return path


def _inside_quotes(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"')
