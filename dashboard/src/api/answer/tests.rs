//! Tests of whole answers, cut into pieces of every length.

use super::*;
use serde_json::json;

/// The thought, the words and the calls of an answer.
type Parsed = (String, String, Vec<(String, String)>);

fn parse(answer: &str, piece: usize, tools: &[Value]) -> Parsed {
    let mut parser = AnswerParser::new(tools, Beginning::Plain);
    let chars: Vec<char> = answer.chars().collect();
    let mut deltas = Vec::new();
    for piece in chars.chunks(piece) {
        deltas.extend(parser.push(&piece.iter().collect::<String>()));
    }
    deltas.extend(parser.finish());
    let mut parsed = Parsed::default();
    for delta in deltas {
        match delta {
            Delta::Thought(text) => parsed.0.push_str(&text),
            Delta::Words(text) => parsed.1.push_str(&text),
            Delta::Call(call) => parsed.2.push((call.name, call.arguments)),
        }
    }
    parsed
}

fn tools() -> Vec<Value> {
    let properties = json!({ "s": { "type": "string" }, "n": { "type": "integer" } });
    vec![json!({ "type": "function", "function": { "name": "f", "parameters": { "properties": properties } } })]
}

fn check(answer: &str, thought: &str, words: &str, calls: &[(&str, &str)]) {
    let calls = calls.iter().map(|&(name, arguments)| (name.to_owned(), arguments.to_owned())).collect();
    let expected = (thought.to_owned(), words.to_owned(), calls);
    for piece in [1, 2, 3, 7, 1000] {
        assert_eq!(parse(answer, piece, &tools()), expected, "{answer:?} by {piece}");
    }
}

/// R4.4, R4.5: the calls of each format, with the text around them.
#[test]
fn calls_are_parsed_in_each_format() {
    let f = ("f", "{\"a\":1}");
    let two = "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>\n";
    check(two, "", "I look.", &[f, ("g", "{}")]);
    check(
        "<think>\nhm\n</think>\n\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call> Done.",
        "hm",
        "Done.",
        &[f],
    );
    check("<tool_call>{\"name\": \"f\", \"arguments\": \"\"}", "", "", &[("f", "{}")]);
    let between = "I look.\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>\nDone.";
    check(between, "", "I look.\n\nDone.", &[f]);
    let xml = "<tool_call>\n<function=f>\n<parameter=s>\n42\n</parameter>\n<parameter=n>\n42\n</parameter>\n</function>\n</tool_call>";
    check(xml, "", "", &[("f", "{\"s\":\"42\",\"n\":42}")]);
    check("[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": 1}}]", "", "", &[f]);
    check("Hm. [TOOL_CALLS]f[ARGS]{\"a\":1}[TOOL_CALLS]g[ARGS]{}", "", "Hm.", &[f, ("g", "{}")]);
    check("<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"a\": 1}}]<|/tool_call|>", "", "", &[f]);
    check("{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "", "", &[f]);
    check("<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "", "", &[f]);
}

#[test]
fn text_without_valid_calls_is_unchanged() {
    for words in [
        "plain",
        " {\"a\": 1} ",
        "<tool_call>nonsense</tool_call> x",
        "<tool_call>",
        "a < b and <tool",
        "{\"name\": \"f\"",
        "  two  spaces \n",
        "[TOOL_CALLS]",
    ] {
        check(words, "", words, &[]);
    }
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    assert_eq!(parse(call, 1, &[]), (String::new(), call.to_owned(), Vec::new()), "no tools are given");
}

/// R4.4, R4.5: analysis is reasoning, the final channel is text, and a message to a function is a call.
#[test]
fn harmony_is_parsed_by_its_channels() {
    let answer = "<|channel|>analysis<|message|>I must <b> look.<|end|><|start|>assistant<|channel|>commentary<|message|>A moment.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\":1}";
    check(answer, "I must <b> look.", "A moment.", &[("f", "{\"a\":1}")]);
    check("<|channel|>final<|message|>Yes | no <|", "", "Yes | no <|", &[]);
    check("<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>", "", "", &[("f", "{}")]);
    // Cut off within a call, or within a header.
    check("<|channel|>commentary to=functions.f<|message|>{\"a\":", "", "{\"a\":", &[]);
    check("<|channel|>analysis<|message|>hm<|end|><|start|>assis", "hm", "", &[]);
    check("<|chan", "", "<|chan", &[]);
    check("<|channel|>commentary to=functions.f<|message|>", "", "", &[("f", "{}")]);
    // Text that only looks like harmony.
    check("<|channel|> is a token of gpt-oss.", "", "<|channel|> is a token of gpt-oss.", &[]);
    let long = format!("<|start|>{}", "word ".repeat(300));
    check(&long, "", &long, &[]);
}

/// Words stream: only what may become a marker waits.
#[test]
fn words_are_not_held_back() {
    let mut parser = AnswerParser::new(&tools(), Beginning::Plain);
    assert_eq!(parser.push("It is"), [Delta::Words("It is".to_owned())]);
    assert_eq!(parser.push(" 2 < 3"), [Delta::Words(" 2 < 3".to_owned())]);
    assert_eq!(parser.push(" <tool"), []);
    assert_eq!(parser.push("box>"), [Delta::Words(" <toolbox>".to_owned())]);
    assert_eq!(parser.finish(), []);
}
