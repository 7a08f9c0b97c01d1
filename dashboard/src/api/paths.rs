//! Paths as clients spell them: doubled and trailing slashes, and OpenAI's paths without `/v1`.

use axum::Router;
use axum::extract::Request;
use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use tower::util::{MapRequest, ServiceExt};

/// OpenAI's paths, which clients send without `/v1` if their base address lacks it.
const UNVERSIONED: [&str; 2] = ["/chat/completions", "/completions"];

const MODELS: &str = "/v1/models/";

/// The service of the routes, which also serves other spellings of their paths.
pub(super) fn lenient_paths(routes: Router) -> MapRequest<Router, fn(Request) -> Request> {
    routes.map_request(with_usual_path as fn(Request) -> Request)
}

fn with_usual_path(mut request: Request) -> Request {
    if let Some(path) = usual(request.uri().path()) {
        let query = request.uri().query().map_or(String::new(), |query| format!("?{query}"));
        let mut parts = request.uri().clone().into_parts();
        parts.path_and_query = PathAndQuery::try_from(format!("{path}{query}")).ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// The usual spelling of a path; `None` if the path has it already, or ends with a model's name.
fn usual(path: &str) -> Option<String> {
    // What follows is a model's name, which may be a path of its own.
    if path.starts_with(MODELS) {
        return None;
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let mut usual = format!("/{}", parts.join("/"));
    if UNVERSIONED.contains(&usual.as_str()) {
        usual.insert_str(0, "/v1");
    }
    // `/v1/v1/…`: the client's base address has the version, and the client adds it, too.
    if let Some(rest) = usual.strip_prefix("/v1/v1/") {
        usual = format!("/v1/{rest}");
    }
    (usual != path).then_some(usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_spellings_lead_to_the_usual_path() {
        let cases = [
            ("/v1/chat/completions", None),
            ("/", None),
            ("/v1/chat/completions/", Some("/v1/chat/completions")),
            ("//v1//chat/completions", Some("/v1/chat/completions")),
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/completions//", Some("/v1/completions")),
            ("/v1/v1/models", Some("/v1/models")),
            ("/health/", Some("/health")),
            ("/v1/models//folder/m.gguf", None),
        ];
        for (path, expected) in cases {
            assert_eq!(usual(path).as_deref(), expected, "{path}");
        }
    }
}
