//! Decides which requests over TCP are admitted.
//!
//! Any page in a browser can make the browser send requests to this machine. `Origin` then has the page's address, as
//! does `Host` after DNS rebinding: both must be this node's, but for origins that the user allows. Where a key is
//! configured, requests without the key are rejected, whatever their headers say.

use super::error::ApiError;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::collections::BTreeSet;
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// Stands for all origins.
pub(super) const ANY_ORIGIN: &str = "*";

/// The guard's settings.
#[derive(Clone)]
pub(super) struct Guard {
    /// The API key that requests must have. `None`: no key is needed, and only loopback is served.
    pub(super) key: Option<Arc<str>>,
    /// Origins besides the node's own whose pages may use the API.
    pub(super) origins: Arc<BTreeSet<String>>,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("key", &self.key.as_ref().map(|_| "…")).finish()
    }
}

pub(super) async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    // Load balancers and service managers check the node's health without a key.
    let is_open = request.uri().path() == "/health";
    match guard.check(request.headers(), is_open) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

impl Guard {
    fn check(&self, headers: &HeaderMap, is_open: bool) -> Result<(), ApiError> {
        let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
        let host = text(header::HOST).unwrap_or_default();
        if self.key.is_none() && !is_loopback(host) {
            let what = format!("the Host header is `{host}`: this node serves only loopback names");
            return Err(ApiError::new(StatusCode::FORBIDDEN, "foreign_host", what));
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or_default();
            let authority = origin.split_once("://").map_or("", |(_, authority)| authority);
            let is_own = !authority.is_empty() && authority.eq_ignore_ascii_case(host);
            let is_allowed = self.origins.contains(ANY_ORIGIN) || self.origins.contains(origin);
            if !is_own && !is_allowed {
                let what = format!("pages of `{origin}` may not use this node: it allows no such origin");
                return Err(ApiError::new(StatusCode::FORBIDDEN, "foreign_origin", what));
            }
        }
        match &self.key {
            Some(key) if !is_open && !is_key(key, headers) => {
                let what = "this node needs its API key: send it as `Authorization: Bearer KEY`";
                Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", what))
            }
            _ => Ok(()),
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn is_key(key: &str, headers: &HeaderMap) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| value.split_once(' '));
    // The name of the scheme may be in any case (RFC 9110, §11.1).
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key);
    let given = bearer.or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok()));
    given.is_some_and(|given| given.trim().as_bytes().ct_eq(key.as_bytes()).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderName;

    fn check(key: Option<&str>, headers: &[(&'static str, &str)]) -> Option<u16> {
        let origins = Arc::new(BTreeSet::from(["app://obsidian.md".to_owned()]));
        let guard = Guard { key: key.map(Arc::from), origins };
        let headers = headers.iter().map(|&(name, value)| {
            (HeaderName::from_static(name), value.parse().unwrap_or_else(|_| header::HeaderValue::from_static("")))
        });
        guard.check(&headers.collect(), false).err().map(|error| error.status.as_u16())
    }

    #[test]
    fn loopback_names_and_own_pages_are_admitted() {
        for host in ["localhost:52415", "127.0.0.1:1", "[::1]:52415", "LOCALHOST", "127.0.0.1"] {
            assert_eq!(check(None, &[("host", host)]), None, "{host}");
        }
        assert_eq!(check(None, &[("host", "localhost:1"), ("origin", "http://localhost:1")]), None);
    }

    #[test]
    fn rebound_names_and_foreign_pages_are_rejected() {
        for host in ["evil.example", "evil.example:52415", "127.0.0.1.evil.example", "", "192.168.0.4:52415"] {
            assert_eq!(check(None, &[("host", host)]), Some(403), "{host}");
        }
        assert_eq!(check(None, &[("host", "localhost:1"), ("origin", "app://obsidian.md")]), None);
        for origin in ["http://evil.example", "null", "http://localhost:2", "https://localhost.evil.example:1"] {
            assert_eq!(check(None, &[("host", "localhost:1"), ("origin", origin)]), Some(403), "{origin}");
        }
    }

    #[test]
    fn a_configured_key_is_required() {
        let host = ("host", "gpu-box.lan:52415");
        assert_eq!(check(Some("secret"), &[host]), Some(401));
        assert_eq!(check(Some("secret"), &[host, ("authorization", "Bearer wrong")]), Some(401));
        assert_eq!(check(Some("secret"), &[host, ("authorization", "Bearer secret")]), None);
        assert_eq!(check(Some("secret"), &[host, ("authorization", "bearer secret")]), None);
        assert_eq!(check(Some("secret"), &[host, ("authorization", "Basic secret")]), Some(401));
        assert_eq!(check(Some("secret"), &[host, ("x-api-key", "secret")]), None);
        let foreign = [host, ("authorization", "Bearer secret"), ("origin", "http://evil.example")];
        assert_eq!(check(Some("secret"), &foreign), Some(403));
    }
}
