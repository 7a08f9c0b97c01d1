//! `exo-node chat`: an interactive conversation with a model.

use super::model_args::ModelArguments;
use super::outcome::Outcome;
use super::progress::Display;
use super::session::Session;
use super::shown::ShownAnswer;
use crate::config::data_folder;
use crate::{
    FinishReason, GenerateRequest, Generated, Message, Prompt, RequestError, Role, SamplingParams, fresh_seed,
};
use anyhow::Context;
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde::{Deserialize, Serialize};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node chat smollm2
  exo-node chat qwen3-4b --system \"You are a pirate.\" --temperature 0.7

In the conversation: /help lists the commands; a line that ends with \\ continues on the next line; Ctrl-C stops
the answer, Ctrl-D leaves.")]
pub(super) struct ChatArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// System prompt, before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer [default: until the model ends it, or the context is full]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Sampling temperature: 0 always takes the likeliest token; higher values vary more
    #[arg(long, value_name = "T", default_value_t = 0.7, allow_negative_numbers = true)]
    temperature: f32,
    /// Sample from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    top_p: f32,
    /// Seed of the sampling: the same seed gives the same tokens [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Continue a saved conversation
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
}

/// A conversation, in the format of its file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Conversation {
    model: String,
    messages: Vec<Message>,
}

/// A line of input: a message or a command.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Input<'a> {
    Say(&'a str),
    System(&'a str),
    Save(&'a str),
    Load(&'a str),
    Clear,
    History,
    Help,
    Exit,
    Unknown(&'a str),
}

const HELP: &str = "/system [TEXT]  set the system prompt, or show it
/history        show the conversation so far
/clear          start a new conversation
/save FILE      save the conversation
/load FILE      continue a saved conversation
/exit           leave (also Ctrl-D)";

impl<'a> Input<'a> {
    fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else { return Self::Say(line) };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match name {
            "system" => Self::System(rest.trim()),
            "save" => Self::Save(rest.trim()),
            "load" => Self::Load(rest.trim()),
            "clear" | "new" => Self::Clear,
            "history" => Self::History,
            "help" | "?" => Self::Help,
            "exit" | "quit" | "bye" => Self::Exit,
            _ => Self::Unknown(name),
        }
    }
}

impl Conversation {
    fn system(&self) -> Option<&str> {
        self.messages.first().filter(|message| message.role == Role::System).map(|message| message.text())
    }

    fn set_system(&mut self, text: &str) {
        if self.system().is_some() {
            self.messages.remove(0);
        }
        if !text.is_empty() {
            self.messages.insert(0, Message::new(Role::System, text));
        }
    }

    fn clear(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
    }

    fn save(&self, path: &str) -> anyhow::Result<()> {
        anyhow::ensure!(!path.is_empty(), "/save needs a file name");
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| format!("{path} cannot be written"))
    }

    fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a saved conversation", path.display()))
    }

    fn show(&self) {
        for message in &self.messages {
            let who = match message.role {
                Role::System => "system",
                Role::User => "you",
                Role::Assistant => "model",
                Role::Tool => "tool",
            };
            println!("{who}: {}", message.text());
        }
    }
}

/// A conversation with its model.
struct Chat {
    arguments: ChatArguments,
    session: Session,
    conversation: Conversation,
}

pub(super) async fn run(arguments: ChatArguments) -> anyhow::Result<Outcome> {
    let display = Arc::new(Display::new());
    let mut conversation = match &arguments.load {
        Some(path) => Conversation::load(path)?,
        None => Conversation::default(),
    };
    conversation.model = arguments.model.spec().to_string();
    if let Some(system) = &arguments.system {
        conversation.set_system(system);
    }
    arguments.params().check().map_err(RequestError::from)?;
    let history = data_folder(arguments.model.data_dir.as_deref())?.join("chat_history");
    let Some(session) = Session::open(&arguments.model, &display).await? else {
        return Ok(Outcome::Interrupted);
    };
    if session.is_base_model() {
        eprintln!("{} is a base model without a chat template: it continues plain text", arguments.model.model);
    }
    if std::io::stdin().is_terminal() {
        eprintln!("{}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", conversation.model);
    }
    let mut chat = Chat { arguments, session, conversation };
    while let Some(line) = read(&history).await? {
        if !chat.take(&line).await? {
            break;
        }
    }
    chat.session.close().await;
    Ok(Outcome::Done)
}

/// The next input, joined from lines that end with `\`; `None` when the user leaves.
async fn read(history: &Path) -> anyhow::Result<Option<String>> {
    let mut text = String::new();
    loop {
        let prompt = if text.is_empty() { "> " } else { "… " };
        let history = history.to_owned();
        // Reading blocks, so it runs in its own thread.
        let reading = tokio::task::spawn_blocking(move || read_line(prompt, &history));
        let line = tokio::select! {
            line = reading => line?,
            // Only where stdin is not a terminal: on a terminal the editor reads Ctrl-C as a key.
            _ = tokio::signal::ctrl_c() => return Ok(None),
        };
        match line {
            Ok(line) => match line.strip_suffix('\\') {
                Some(part) => {
                    text.push_str(part);
                    text.push('\n');
                }
                None => return Ok(Some(text + &line)),
            },
            Err(ReadlineError::Interrupted) => text.clear(),
            Err(ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads one line of a terminal or a file. The editor catches SIGINT while it exists, so it exists for one line only:
/// between lines this process handles Ctrl-C.
fn read_line(prompt: &str, history: &Path) -> Result<String, ReadlineError> {
    let mut editor = DefaultEditor::new()?;
    // Before the first conversation there is no history file.
    let _ = editor.load_history(history);
    let line = editor.readline(prompt)?;
    // A line that cannot be added to the history is still sent.
    let _ = editor.add_history_entry(&line).and_then(|_| editor.append_history(history));
    Ok(line)
}

impl ChatArguments {
    fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed.unwrap_or_else(fresh_seed),
            ..SamplingParams::greedy()
        }
    }
}

impl Chat {
    /// Executes a line of input. Returns whether the conversation continues.
    async fn take(&mut self, line: &str) -> anyhow::Result<bool> {
        let conversation = &mut self.conversation;
        let done = match Input::parse(line) {
            Input::Say("") => Ok(()),
            Input::Say(text) => return self.say(text).await.map(|()| true),
            Input::System("") => {
                println!("{}", conversation.system().unwrap_or("(nothing)"));
                Ok(())
            }
            Input::System(text) => {
                conversation.set_system(text);
                Ok(())
            }
            Input::Save(path) => conversation.save(path),
            Input::Load(path) => Conversation::load(Path::new(path)).map(|loaded| {
                let model = std::mem::take(&mut conversation.model);
                *conversation = Conversation { model, ..loaded };
            }),
            Input::Clear => {
                conversation.clear();
                Ok(())
            }
            Input::History => {
                conversation.show();
                Ok(())
            }
            Input::Help => {
                println!("{HELP}");
                Ok(())
            }
            Input::Exit => return Ok(false),
            Input::Unknown(name) => {
                eprintln!("/{name} is not a command: /help lists the commands");
                Ok(())
            }
        };
        // A file error does not end the conversation.
        if let Err(error) = done {
            eprintln!("error: {error:#}");
        }
        Ok(true)
    }

    async fn say(&mut self, text: &str) -> anyhow::Result<()> {
        self.conversation.messages.push(Message::new(Role::User, text));
        let mut answer = ShownAnswer::new();
        let outcome = tokio::select! {
            outcome = self.answer(&mut answer) => Some(outcome),
            _ = tokio::signal::ctrl_c() => None,
        };
        println!();
        match outcome {
            Some(Err(error)) => {
                // A message without an answer does not stay in the conversation.
                self.conversation.messages.pop();
                eprintln!("error: {error:#}");
                return Ok(());
            }
            Some(Ok(FinishReason::Length)) => eprintln!("(cut off: the answer reached its limit)"),
            Some(Ok(FinishReason::Stop)) => {}
            None => eprintln!("(stopped)"),
        }
        let thought = Some(answer.thought).filter(|thought| !thought.is_empty());
        let message = Message { reasoning_content: thought, ..Message::new(Role::Assistant, answer.words) };
        self.conversation.messages.push(message);
        Ok(())
    }

    /// Prints the answer while it is generated, and appends it to `answer`.
    async fn answer(&self, answer: &mut ShownAnswer) -> anyhow::Result<FinishReason> {
        let request = GenerateRequest {
            model: self.arguments.model.spec(),
            prompt: Prompt::Chat(self.conversation.messages.clone().into()),
            params: self.arguments.params(),
            max_tokens: self.arguments.max_tokens,
            stop: Vec::new(),
        };
        let mut answering = self.session.generate(request).await?;
        while let Some(event) = answering.next().await {
            let (text, finish) = match event? {
                Generated::Started { .. } => continue,
                Generated::Token { text, .. } => (text, None),
                Generated::Finished { text, reason, .. } => (text, Some(reason)),
            };
            answer.push(&text)?;
            if let Some(reason) = finish {
                answer.finish()?;
                return Ok(reason);
            }
        }
        Err(RequestError::ShuttingDown.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(Input::parse(" Hello there "), Input::Say("Hello there"));
        assert_eq!(Input::parse("/system  You are brief. "), Input::System("You are brief."));
        assert_eq!(Input::parse("/save a b.json"), Input::Save("a b.json"));
        assert_eq!(Input::parse("/exit"), Input::Exit);
        assert_eq!(Input::parse("/nonsense x"), Input::Unknown("nonsense"));
    }

    #[test]
    fn the_one_system_message_comes_first() {
        let mut conversation = Conversation::default();
        conversation.messages.push(Message::new(Role::User, "Hi"));
        conversation.set_system("A");
        conversation.set_system("B");
        assert_eq!((conversation.system(), conversation.messages.len()), (Some("B"), 2));
        conversation.clear();
        assert_eq!(conversation.messages.len(), 1);
        conversation.set_system("");
        assert!(conversation.messages.is_empty());
    }
}
