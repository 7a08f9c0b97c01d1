//! A small service that embeds a node and adds an actor of its own.
//!
//! `cargo run --release --example embed -- MODEL "one question" "another"`
//!
//! The actor, a scribe, receives questions, asks the node, and keeps minutes of the answers. The example shows how an
//! embedder lets engines run in processes of their own, starts a node, holds its handle inside an actor, streams
//! answers, and shuts the node down.

use exo::{GenerateRequest, Generated, ModelSpec, Node, NodeHandle, Prompt, SamplingParams};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};

/// An actor that answers questions and keeps them with their answers.
struct Scribe;

enum ScribeMsg {
    Ask { question: String, reply: RpcReplyPort<String> },
    Minutes(RpcReplyPort<Vec<(String, String)>>),
    Answered { question: String, answer: String },
}

// ractor also supports remote messages; these stay in this process.
impl ractor::Message for ScribeMsg {}

struct ScribeState {
    node: NodeHandle,
    model: ModelSpec,
    minutes: Vec<(String, String)>,
}

impl Actor for Scribe {
    type Msg = ScribeMsg;
    type State = ScribeState;
    type Arguments = (NodeHandle, ModelSpec);

    async fn pre_start(
        &self,
        _: ActorRef<ScribeMsg>,
        (node, model): (NodeHandle, ModelSpec),
    ) -> Result<ScribeState, ActorProcessingErr> {
        Ok(ScribeState { node, model, minutes: Vec::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<ScribeMsg>,
        message: ScribeMsg,
        state: &mut ScribeState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ScribeMsg::Ask { question, reply } => {
                // An answer takes time: a task waits for it, so that the actor can handle other messages.
                let (node, model) = (state.node.clone(), state.model.clone());
                tokio::spawn(async move {
                    let answer =
                        ask(&node, model, &question).await.unwrap_or_else(|error| format!("no answer: {error}"));
                    let _ = myself.send_message(ScribeMsg::Answered { question, answer: answer.clone() });
                    let _ = reply.send(answer);
                });
            }
            ScribeMsg::Answered { question, answer } => state.minutes.push((question, answer)),
            ScribeMsg::Minutes(reply) => drop(reply.send(state.minutes.clone())),
        }
        Ok(())
    }
}

async fn ask(node: &NodeHandle, model: ModelSpec, question: &str) -> Result<String, exo::RequestError> {
    let mut generation = node.generate(GenerateRequest {
        model,
        prompt: Prompt::Text(question.to_owned()),
        params: SamplingParams::greedy(),
        max_tokens: Some(12),
        stop: Vec::new(),
    })?;
    let mut answer = String::new();
    while let Some(event) = generation.next().await {
        match event? {
            Generated::Token { text, .. } | Generated::Finished { text, .. } => answer.push_str(&text),
            Generated::Started { .. } => {}
        }
    }
    Ok(answer)
}

fn main() -> anyhow::Result<()> {
    // Before the runtime starts its threads.
    exo::run_worker_if_asked();
    answer_questions()
}

#[tokio::main]
async fn answer_questions() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = ModelSpec::new(arguments.next().unwrap_or_else(|| "smollm2".to_owned()));
    let node = Node::builder().start().await?;
    let (scribe, _) = Scribe::spawn(None, Scribe, (node.clone(), model)).await?;
    for question in arguments {
        let answer = ractor::call!(scribe, |reply| ScribeMsg::Ask { question: question.clone(), reply })?;
        println!("{question} -> {answer}");
    }
    let minutes = ractor::call!(scribe, ScribeMsg::Minutes)?;
    println!("{} answers in the minutes", minutes.len());
    scribe.stop(None);
    node.shutdown().await;
    Ok(())
}
