//! The HTTP API of a running node.

use crate::node::{Node, Setup};
use crate::{SMOLLM2, exo, ids, json, models, output, stderr};
use serde_json::{Value, json as object};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn question(text: &str, more: Value) -> Value {
    let mut body = object!({ "model": SMOLLM2, "temperature": 0, "messages": [{ "role": "user", "content": text }] });
    for (key, value) in more.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// R4.4, R4.5: OpenAI's own client gets what it expects: whole and streamed answers, usage, log-probabilities, stop
/// strings, `n`, seeds, errors.
#[test]
fn the_official_client_is_served() {
    models();
    let python = std::env::var("EXO_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_client = Command::new(&python).args(["-c", "import openai"]).output().is_ok_and(|o| o.status.success());
    if !has_client {
        eprintln!("SKIPPED: {python} has no `openai` package; ./test.sh installs it (EXO_TEST_PYTHON)");
        return;
    }
    let node = Node::up(&[]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system/openai_client.py");
    let output = Command::new(python).args([script, &format!("http://127.0.0.1:{}/v1", node.port), SMOLLM2]).output();
    let output = output.expect("Python starts");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", stderr(&output));
}

/// R8.1–R8.5: a bad request gets the right status, and an error in OpenAI's format that names the bad value.
#[test]
fn mistakes_have_the_right_status() {
    models();
    let node = Node::up(&[]);
    let long = "word ".repeat(9000);
    let chat = |more: Value| question("Hi", more);
    let cases: [(&str, Value, u16, &str); 14] = [
        ("/v1/chat/completions", chat(object!({ "model": "no-such-model" })), 404, "no-such-model"),
        ("/v1/chat/completions", chat(object!({ "model": "/etc/passwd" })), 404, "/etc/passwd"),
        ("/v1/chat/completions", chat(object!({ "model": "../../etc/passwd" })), 404, "passwd"),
        ("/v1/chat/completions", chat(object!({ "model": "" })), 400, "model"),
        ("/v1/chat/completions", chat(object!({ "messages": [] })), 400, "messages"),
        ("/v1/chat/completions", object!({ "messages": [] }), 400, "model"),
        ("/v1/chat/completions", chat(object!({ "temperature": "warm" })), 400, "temperature"),
        ("/v1/chat/completions", chat(object!({ "top_p": 7 })), 400, "top_p"),
        ("/v1/chat/completions", chat(object!({ "max_tokens": 0 })), 400, "max_tokens"),
        ("/v1/chat/completions", chat(object!({ "stop": vec!["x"; 17] })), 400, "stop"),
        (
            "/v1/chat/completions",
            chat(object!({ "response_format": { "type": "json_object" } })),
            400,
            "response_format",
        ),
        ("/v1/chat/completions", question(&long, object!({})), 400, "context"),
        ("/v1/completions", object!({ "model": SMOLLM2, "prompt": "x", "best_of": 4 }), 400, "best_of"),
        ("/v1/nothing", object!({}), 404, "/v1/nothing"),
    ];
    for (path, body, status, named) in cases {
        let answer = node.post(path, &body);
        let error = &answer.json()["error"];
        assert_eq!(answer.status, status, "{body}: {error}");
        let told = format!("{} {}", error["message"], error["param"]);
        assert!(told.contains(named) && error["type"].is_string() && error["code"].is_string(), "{body}: {error}");
    }
    assert_eq!(node.request("POST", "/v1/chat/completions", &[], "{not json").status, 400);
    assert_eq!(node.get("/v1/chat/completions").status, 405);
    let large = format!("{{\"model\": \"{}\"}}", "x".repeat(33 << 20));
    let refused = node.request("POST", "/v1/completions", &[], &large);
    assert_eq!(refused.status, 413);
    assert!(refused.body.contains("33554432"), "{}", refused.body);
    // The node still answers.
    assert_eq!(node.post("/v1/chat/completions", &chat(object!({ "max_tokens": 3 }))).status, 200);
    assert_eq!(node.get("/health").json()["status"], "ok");
}

/// R8.1–R8.5: over TCP a path is an unknown model, whether a file is there or not, unless the node was started with it.
/// A folder of the working directory hides no name of the catalogue.
#[test]
fn paths_over_tcp_are_unknown_models() {
    models();
    let file = json(&["pull", SMOLLM2, "--json"])["path"].as_str().expect("a path").to_owned();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["sub", "given", "smollm2"] {
        std::fs::create_dir(folder.path().join(name)).expect("a folder");
        std::os::unix::fs::symlink(&file, folder.path().join(name).join("m.gguf")).expect("a link");
    }
    let setup = Setup { arguments: vec!["given/m.gguf".to_owned()], ..Setup::default() };
    let node = Node::start(setup, folder);
    let ask = |model: &str| {
        let body = question("Hi", object!({ "model": model, "max_tokens": 2 }));
        let answer = node.post("/v1/chat/completions", &body);
        (answer.status, answer.body.replace(model, "MODEL"))
    };
    let unknown = ask("sub/none.gguf");
    assert_eq!(unknown.0, 404, "{}", unknown.1);
    let absolute = node.folder().join("sub/m.gguf").display().to_string();
    for path in ["sub/m.gguf", "./sub/m.gguf", "./sub", "./smollm2", "../..", "~", "~/.cache", &file, &absolute] {
        assert_eq!(ask(path), unknown, "{path}");
    }
    for draft in ["sub/m.gguf", "sub/m.gguf@q4_k", "m.gguf@q4_k", "./sub@q8_0", "..@q4_k"] {
        let answer = node.post("/plan", &object!({ "model": SMOLLM2, "draft": draft }));
        assert_eq!(answer.status, 404, "{draft}: {}", answer.body);
    }
    let given = node.folder().join("given/m.gguf").display().to_string();
    for name in ["given/m.gguf", "./given/m.gguf", given.as_str(), SMOLLM2] {
        let (status, body) = ask(name);
        assert_eq!(status, 200, "{name}: {body}");
    }
    // All spellings of a path are one model, which the command line finds from any folder.
    let run = |folder: &str, model: &str| {
        let mut command = node.prepare(&["run", model, "Hi", "--json", "--max-tokens", "2"]);
        let output = command.current_dir(node.folder().join(folder)).output().expect("exo-node starts");
        assert!(output.status.success(), "{model}: {}", stderr(&output));
        serde_json::from_slice::<Value>(&output.stdout).expect("one object")
    };
    for (folder, model) in [(".", "given/m.gguf"), ("given", "m.gguf"), ("sub", "../given/m.gguf"), ("sub", &given)] {
        let report = run(folder, model);
        assert_eq!((&report["model"], &report["load_ms"]), (&object!("given/m.gguf"), &Value::Null), "{report}");
        assert!(report["stages"].as_array().is_some_and(|stages| stages.len() == 1), "{report}");
    }
    let instances = node.state()["instances"].as_object().map(serde_json::Map::len);
    assert_eq!(instances, Some(2), "{}", node.state());
    // A folder whose name is not spelt as a path is named with the spelling that helps.
    let output = node.prepare(&["run", "sub", "Hi"]).current_dir(node.folder()).output().expect("exo-node starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("write ./sub"), "{}", stderr(&output));
}

/// R4.4, R4.5: what clients send besides the specification: fields twice and under two names, numbers as floats, no
/// limits, empty stops, other spellings of paths, half characters.
#[test]
fn habits_of_clients_are_understood() {
    models();
    let node = Node::up(&["--allow-origin", "app://obsidian.md"]);
    let post = |path: &str, body: &str| {
        let answer = node.request("POST", path, &[], body);
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        answer.json()
    };
    let chat = |more: &str| {
        let message = r#"{"role": "user", "content": "Name a colour."}"#;
        post("/v1/chat/completions", &format!(r#"{{"model": "{SMOLLM2}", "messages": [{message}], {more}}}"#))
    };
    let greedy = chat(r#""temperature": 0, "max_tokens": 4"#);
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].clone();
    for same in [
        r#""top_p": 0, "max_tokens": 4"#,
        r#""temperature": 0, "max_tokens": 9, "max_tokens": 4"#,
        r#""temperature": 0, "max_tokens": 4.0, "stop": """#,
        r#""temperature": 0, "max_tokens": 9, "max_completion_tokens": 4, "stop": ["", "zzzz"]"#,
        r#""temperature": 0, "max_tokens": 4, "repeat_penalty": 1.0, "repetition_penalty": 1.0"#,
    ] {
        assert_eq!(text(&chat(same)), text(&greedy), "{same}");
    }
    let unlimited = chat(r#""temperature": 0, "max_tokens": -1, "stop": ["."]"#);
    assert_eq!(unlimited["choices"][0]["finish_reason"], "stop", "{unlimited}");
    let messages = r#"[{"role": "user", "content": "Hi \ud83d"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "reasoning": "hm", "reasoning_content": "hm"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
          "function": {"name": "f", "arguments": ""}}]},
        {"role": "function", "name": "f", "content": "42"}, {"role": "user", "content": "And?"}]"#;
    post("/v1/chat/completions", &format!(r#"{{"model": "{SMOLLM2}", "messages": {messages}, "max_tokens": 2}}"#));
    for prompt in ["", r#""prompt": "","#] {
        post("/v1/completions", &format!(r#"{{"model": "{SMOLLM2}", {prompt} "max_tokens": 2}}"#));
    }
    let body = question("Hi", object!({ "max_tokens": 2 })).to_string();
    for path in ["/chat/completions", "/v1/chat/completions/", "//v1//chat/completions", "/v1/v1/chat/completions"] {
        post(path, &body);
    }
    for (method, path, status) in [("HEAD", "/v1/models", 200), ("OPTIONS", "/v1/chat/completions", 200)] {
        assert_eq!(node.request(method, path, &[], "").status, status, "{method} {path}");
    }
    let preflight = [
        ("origin", "app://obsidian.md"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization, content-type"),
    ];
    let answer = node.request("OPTIONS", "/v1/chat/completions", &preflight, "");
    assert!(answer.headers.contains("access-control-allow-origin: app://obsidian.md"), "{}", answer.headers);
    assert!(answer.headers.contains("authorization"), "{}", answer.headers);
    let answer = node.request("POST", "/v1/chat/completions", &[("origin", "app://obsidian.md")], &body);
    assert_eq!(answer.status, 200);
    assert!(answer.headers.contains("access-control-allow-origin: app://obsidian.md"), "{}", answer.headers);
}

/// A second node on a data folder is refused before it reaches the network; a data folder with a path that is too long
/// for a socket's address serves all the same.
#[test]
fn one_node_runs_on_a_data_folder_of_any_length() {
    let long = "a-name-of-forty-characters-".repeat(6);
    let folder = tempfile::Builder::new().prefix(&long).tempdir().expect("a temporary folder");
    let node = Node::start(Setup::default(), folder);
    assert!(node.command(&["status"]).status.success());
    let second = node.command(&["up", "--listen", "127.0.0.1:0", "--api", "127.0.0.1:0"]);
    assert_eq!(second.status.code(), Some(1));
    let text = stderr(&second);
    assert!(text.contains("another node is running") && !text.contains("listens for members"), "{text}");
    assert_eq!(node.get("/health").status, 200);
}

/// Requests from pages of other sites, with host names rebound to this machine, or without the key are refused.
#[test]
fn foreign_origins_hosts_and_keys_are_refused() {
    let node = Node::up(&[]);
    let get = |headers: &[(&str, &str)]| node.request("GET", "/v1/models", headers, "").status;
    let own = format!("http://localhost:{}", node.port);
    let host = format!("localhost:{}", node.port);
    assert_eq!(get(&[]), 200);
    assert_eq!(get(&[("host", &host), ("origin", &own)]), 200);
    assert_eq!(get(&[("host", "evil.example")]), 403);
    assert_eq!(get(&[("host", &host), ("origin", "http://evil.example")]), 403);
    drop(node);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let open =
        output(&["up", "--listen", "none", "--api", "0.0.0.0:0", "--data-dir", folder.path().to_str().expect("UTF-8")]);
    assert_eq!(open.status.code(), Some(1));
    assert!(stderr(&open).contains("--api-key"), "{}", stderr(&open));
    let node = Node::up(&["--api", "0.0.0.0:0", "--api-key", "a-secret"]);
    let get = |path: &str, headers: &[(&str, &str)]| node.request("GET", path, headers, "").status;
    assert_eq!(get("/v1/models", &[]), 401);
    assert_eq!(get("/v1/models", &[("authorization", "Bearer another")]), 401);
    assert_eq!(get("/v1/models", &[("authorization", "Bearer a-secret"), ("host", "gpu-box.lan")]), 200);
    assert_eq!(get("/health", &[]), 200);
    // Commands on the node's data folder need no key.
    assert!(node.command(&["status"]).status.success());
}

/// A client that closes its connection cancels its request within a step.
#[test]
fn closing_the_connection_cancels() {
    models();
    let node = Node::up(&[]);
    for is_streamed in [true, false] {
        let before = node.metric("requests_total");
        let body = question(
            "Count to ten thousand.",
            object!({
                "max_tokens": 3500, "stream": is_streamed, "logit_bias": { "2": -100 },
            }),
        );
        let stream = node.send("POST", "/v1/chat/completions", &[], &body.to_string());
        let started = Instant::now();
        while node.metric("requests_running") < 1.0 {
            assert!(started.elapsed() < Duration::from_secs(60), "the request did not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        if is_streamed {
            let mut lines = BufReader::new(&stream).lines();
            assert!(lines.any(|line| line.expect("UTF-8").contains("content")));
        }
        drop(stream);
        let closed = Instant::now();
        while node.metric("requests_running") > 0.0 {
            assert!(closed.elapsed() < Duration::from_secs(20), "the request still runs");
            std::thread::sleep(Duration::from_millis(2));
        }
        println!("streamed {is_streamed}: over {:?} after the close", closed.elapsed());
        assert_eq!(node.metric("requests_total"), before + 1.0);
        assert!(node.metric("generated_tokens_total") < 3000.0);
    }
}

/// A full node refuses requests with 429 and a `retry-after` header; admitted requests continue.
#[test]
fn a_full_node_answers_429_with_retry_after() {
    models();
    let node = Node::up(&[SMOLLM2]);
    let body =
        question("Count.", object!({ "max_tokens": 2000, "stream": true, "logit_bias": { "2": -100 } })).to_string();
    let first: Vec<_> = (0..256).map(|_| node.send("POST", "/v1/chat/completions", &[], &body)).collect();
    let started = Instant::now();
    while node.metric("requests_running") + node.metric("requests_waiting") < 256.0 {
        assert!(started.elapsed() < Duration::from_secs(60), "not all requests were admitted");
        std::thread::sleep(Duration::from_millis(20));
    }
    let refused = node.post("/v1/completions", &object!({ "model": SMOLLM2, "prompt": "x", "max_tokens": 1 }));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.headers.contains("retry-after: ") && refused.body.contains("rate_limit_error"), "{refused:?}");
    let mut lines = BufReader::new(&first[0]).lines();
    assert!(lines.any(|line| line.expect("UTF-8").contains("\"content\":\"")), "an admitted request has no tokens");
}

/// A prefix that requests share is computed once, and reported as `cached_tokens`; the answer is the same.
#[test]
fn a_shared_prefix_is_computed_once() {
    models();
    let node = Node::up(&[SMOLLM2]);
    let system: String = (0..50).map(|i| format!("Rule {i}: be kind to number {}. ", i * 7)).collect();
    let ask = |text: &str| {
        let messages = object!([{ "role": "system", "content": system }, { "role": "user", "content": text }]);
        let started = Instant::now();
        let answer =
            node.post("/v1/chat/completions", &question("", object!({ "messages": messages, "max_tokens": 1 })));
        let elapsed = started.elapsed();
        let usage = answer.json()["usage"].clone();
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
        (elapsed, usage["prompt_tokens"].as_u64().expect("a count"), cached, answer.json()["choices"][0].clone())
    };
    // The first request loads the model.
    let _ = node.post("/v1/chat/completions", &question("Hi", object!({ "max_tokens": 1 })));
    let (cold, prompt, cached, _) = ask("Which rule is the first?");
    assert_eq!(cached, 0);
    let (warm, _, cached, answer) = ask("Which rule is the last?");
    println!("{prompt} tokens: {cold:?} to the first token, then {warm:?} with {cached} cached tokens");
    assert!(cached > prompt * 9 / 10, "{cached} of {prompt}");
    let fresh = Node::up(&[]);
    let messages =
        object!([{ "role": "system", "content": system }, { "role": "user", "content": "Which rule is the last?" }]);
    let undisturbed =
        fresh.post("/v1/chat/completions", &question("", object!({ "messages": messages, "max_tokens": 1 })));
    assert_eq!(undisturbed.json()["choices"][0], answer);
}

/// R6.1–R6.5: three rounds of sixty-four concurrent streams: each stream is answered, and memory does not grow.
#[test]
fn sixty_four_streams_leave_memory_flat() {
    models();
    let node = Node::up(&[]);
    let round = |salt: usize| {
        std::thread::scope(|scope| {
            for number in 0..64 {
                let node = &node;
                scope.spawn(move || {
                    let text = format!("Tell me about the number {}.", number * 31 + salt);
                    let body = question(&text, object!({ "max_tokens": 8, "stream": true }));
                    let answer = node.post("/v1/chat/completions", &body);
                    assert_eq!(answer.status, 200, "{}", answer.body);
                    assert!(answer.body.contains("finish_reason\":\"") && answer.body.trim_end().ends_with("[DONE]"));
                });
            }
        });
        // The monitor measures every second.
        std::thread::sleep(Duration::from_millis(1200));
        node.metric("process_bytes") / 1e6
    };
    let megabytes: Vec<f64> = (0..3).map(|number| round(number * 10_000)).collect();
    println!("64 streams, three times: {megabytes:.0?} MB resident");
    // The first round is not compared: it allocates the cache's pages.
    assert!(megabytes[2] < megabytes[1] + 24.0, "{megabytes:?}");
}

/// Commands use a running node: the answers are the same, and no model is loaded twice.
#[test]
fn commands_use_the_running_node() {
    models();
    let node = Node::up(&[]);
    let ask = ["run", SMOLLM2, "Tell me of the sea.", "--json", "--max-tokens", "12", "--logprobs", "2"];
    let through = node.json(&ask);
    assert_eq!(through["load_ms"], Value::Null);
    assert_eq!(through["stages"][0]["layers"], object!([0, 30]));
    let alone = json(&[&ask[..], &["--standalone"]].concat());
    assert_eq!(ids(&through["token_ids"]), ids(&alone["token_ids"]));
    assert_eq!(through["logprobs"], alone["logprobs"]);
    let state = node.json(&["status", "--json"]);
    let instance = state["instances"].as_object().and_then(|all| all.values().next()).expect("an instance");
    assert_eq!(instance["model"]["name"], SMOLLM2);
    assert_eq!(instance["totals"]["generated_tokens"], 12);
    let drawn = node.command(&["status"]);
    assert!(String::from_utf8_lossy(&drawn.stdout).contains("layers 0–29 on cpu"));
    let threads = node.command(&[&ask[..], &["--threads", "1"]].concat());
    assert!(stderr(&threads).contains("--standalone"), "{}", stderr(&threads));
    let second = node.command(&["up", "--listen", "none", "--api", "127.0.0.1:0"]);
    assert!(stderr(&second).contains("another node is running"), "{}", stderr(&second));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let nobody = output(&["status", "--data-dir", folder.path().to_str().expect("UTF-8")]);
    assert!(stderr(&nobody).contains("exo-node up"), "{}", stderr(&nobody));
}

/// A chat keeps its history, is saved, and continues from the saved file.
#[test]
fn a_chat_keeps_its_history_and_is_saved() {
    models();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let saved = folder.path().join("talk.json");
    let path = saved.to_str().expect("UTF-8");
    let talk = |input: String, more: &[&str]| {
        let mut command = exo(&["chat", SMOLLM2, "--temperature", "0", "--max-tokens", "8"]);
        command.args(more).args(["--data-dir", folder.path().to_str().expect("UTF-8")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("exo-node starts");
        std::io::Write::write_all(&mut child.stdin.take().expect("piped"), input.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    talk(format!("/system Be brief.\nMy name is Ada.\n/nonsense\n/load {path}.none\n/save {path}\n/exit\n"), &[]);
    let mut text = String::new();
    std::fs::File::open(&saved).expect("it was saved").read_to_string(&mut text).expect("readable");
    let conversation: Value = serde_json::from_str(&text).expect("JSON");
    let roles: Vec<&str> =
        conversation["messages"].as_array().expect("a list").iter().filter_map(|m| m["role"].as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    assert_eq!(
        (&conversation["model"], &conversation["messages"][1]["content"]),
        (&object!(SMOLLM2), &object!("My name is Ada."))
    );
    let shown = talk("/history\n/clear\n/history\n".to_owned(), &["--load", path]);
    assert_eq!(shown.matches("you: My name is Ada.").count(), 1, "{shown}");
    assert_eq!(shown.matches("system: Be brief.").count(), 2, "{shown}");
}

/// Ctrl-C on a terminal stops the answer, and not the chat.
#[test]
fn ctrl_c_stops_the_answer_only() {
    models();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system/interrupt.py");
    let mut command = Command::new("python3");
    command.args([script, env!("CARGO_BIN_EXE_exo-node"), SMOLLM2]).arg(folder.path());
    let output = command.output().expect("Python starts");
    assert!(output.status.success(), "{}", stderr(&output));
}

/// R4.3: to quantise a quantised model again is refused, with an error that says why.
#[test]
fn quantising_twice_is_refused() {
    models();
    for arguments in [&["run", SMOLLM2, "x", "--quantize", "q4_k"][..], &["run", "smollm2@q8_0", "x"]] {
        let refused = output(arguments);
        assert_eq!(refused.status.code(), Some(1));
        assert!(stderr(&refused).contains("already"), "{}", stderr(&refused));
    }
    assert_eq!(output(&["run", SMOLLM2, "x", "--quantize", "q9"]).status.code(), Some(2));
}
