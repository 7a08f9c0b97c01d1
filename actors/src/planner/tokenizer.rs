//! Tokenizer: encoding and chat templates of one model.
//!
//! - owns: the model's tokenizer;
//! - receives: prompts to encode;
//! - emits: the tokenizer to the planner, once it is opened; token ids to callers;
//! - dies when: no request of this node uses its model any more;
//! - supervised by: the planner.
//!
//! Decoding needs no actor: the gateway looks a token's bytes up itself.

use crate::core::request::{Prompt, RequestError};
use crate::transport::callback::EventCallback;
use exo_engines::format::FormatError;
use exo_engines::model::ModelFiles;
use exo_engines::template::Conversation;
use exo_engines::tokenizer::{SpecialTokens, Tokenizer, Tools};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use std::sync::Arc;

pub(crate) type TokenizerRef = ActorRef<TokenizerMsg>;

/// The tokenizer, or why it could not be opened.
pub(crate) type Opened = Result<Arc<Tokenizer>, FormatError>;

#[derive(Debug, RactorMessage)]
pub(crate) enum TokenizerMsg {
    /// The tokenizer, or why it could not be opened; sent by the thread that opens it.
    Opened(Opened),
    Encode {
        prompt: Prompt,
        reply: RpcReplyPort<Result<Vec<u32>, RequestError>>,
    },
}

#[derive(Debug)]
pub(crate) struct TokenizerArgs {
    pub files: Arc<ModelFiles>,
    pub opened: EventCallback<Opened>,
}

#[derive(Debug)]
pub(crate) struct TokenizerState {
    args: TokenizerArgs,
    tokenizer: Option<Arc<Tokenizer>>,
}

#[derive(Debug)]
pub(crate) struct TokenizerActor;

impl Actor for TokenizerActor {
    type Msg = TokenizerMsg;
    type State = TokenizerState;
    type Arguments = TokenizerArgs;

    async fn pre_start(&self, myself: TokenizerRef, args: TokenizerArgs) -> Result<TokenizerState, ActorProcessingErr> {
        let source = args.files.tokenizer.clone();
        tokio::task::spawn_blocking(move || {
            let opened = Tokenizer::open(&source).map(Arc::new);
            // The actor may have stopped.
            let _ = myself.send_message(TokenizerMsg::Opened(opened));
        });
        Ok(TokenizerState { args, tokenizer: None })
    }

    async fn handle(
        &self,
        _: TokenizerRef,
        message: TokenizerMsg,
        state: &mut TokenizerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            TokenizerMsg::Opened(opened) => state.on_opened(opened),
            TokenizerMsg::Encode { prompt, reply } => state.encode(prompt, reply),
        }
        Ok(())
    }
}

impl TokenizerState {
    fn on_opened(&mut self, opened: Opened) {
        self.tokenizer = opened.as_ref().ok().cloned();
        self.args.opened.tell(opened);
    }

    fn encode(&self, prompt: Prompt, reply: RpcReplyPort<Result<Vec<u32>, RequestError>>) {
        let Some(tokenizer) = self.tokenizer.clone() else {
            let _ = reply.send(Err(RequestError::NotReady));
            return;
        };
        tokio::task::spawn_blocking(move || {
            // The caller may no longer wait.
            let _ = reply.send(ids(&tokenizer, &prompt));
        });
    }
}

fn ids(tokenizer: &Tokenizer, prompt: &Prompt) -> Result<Vec<u32>, RequestError> {
    let bad = |what: String| RequestError::BadPrompt { what };
    match prompt {
        Prompt::Tokens(tokens) => {
            let size = tokenizer.vocabulary();
            match tokens.iter().find(|&&token| token as usize >= size) {
                Some(token) => Err(bad(format!("token {token} is outside the vocabulary of {size}"))),
                None => Ok(tokens.clone()),
            }
        }
        Prompt::Text(text) => {
            let ids = tokenizer.encode(text, SpecialTokens::Add).map_err(|e| bad(e.to_string()))?;
            // Without a text, the model begins one.
            Ok(if ids.is_empty() { tokenizer.bos().into_iter().collect() } else { ids })
        }
        Prompt::Chat(conversation) => match tokenizer.template(tools(conversation)) {
            Some(template) => {
                let text = template
                    .map_err(|e| bad(e.to_string()))?
                    .render(conversation, chrono::Local::now().naive_local())
                    .map_err(|e| bad(e.to_string()))?;
                tokenizer.encode(&text, SpecialTokens::AreThere).map_err(|e| bad(e.to_string()))
            }
            // A base model has no template, and continues the messages' texts.
            None => tokenizer.encode(&plain(conversation), SpecialTokens::Add).map_err(|e| bad(e.to_string())),
        },
    }
}

fn tools(conversation: &Conversation) -> Tools {
    if conversation.tools.is_empty() { Tools::Absent } else { Tools::Given }
}

fn plain(conversation: &Conversation) -> String {
    conversation.messages.iter().map(|message| message.text()).collect::<Vec<_>>().join("\n")
}
