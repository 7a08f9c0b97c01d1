//! Draft models: each draft is a short greedy answer of another instance.
//!
//! ```text
//! head ─DraftOrder─► queue ─► task: generate(draft model, all tokens) ─tokens─► head
//! ```
//! The draft model keeps the sequence in its prefix cache, so an answer computes only the tokens since the last one.

use super::GatewayHandle;
use crate::core::request::{GenerateRequest, Generated, Prompt, RequestError};
use crate::core::spec::ModelSpec;
use crate::head::DraftOrder;
use crate::planner::RunningModel;
use crate::transport::callback::EventCallback;
use exo_engines::sampler::SamplingParams;
use std::time::Duration;
use tokio::sync::mpsc;

/// Orders that wait for their task. A task starts at once, so more are never due.
const ORDERS_MAX: usize = 64;
/// How long a sequence waits for its draft. Where a draft model takes longer, it is of little use.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long a draft model may compute behind that: it reads a long prompt once, and later drafts come sooner.
const READING_MAX: Duration = Duration::from_secs(60);

/// The orders of this node's heads.
pub(crate) type DraftOrders = mpsc::Receiver<DraftOrder>;

/// Creates the queue of orders, with the heads' end.
pub(crate) fn draft_orders() -> (EventCallback<DraftOrder>, DraftOrders) {
    let (sender, orders) = mpsc::channel(ORDERS_MAX);
    // An order that is dropped answers that there is no draft.
    (EventCallback::new(move |order| drop(sender.try_send(order))), orders)
}

impl GatewayHandle {
    /// Answers orders until the planner, which holds the heads' end, has stopped.
    pub(super) async fn answer_drafts(self, mut orders: DraftOrders) {
        while let Some(order) = orders.recv().await {
            tokio::spawn(self.clone().answer_draft(order));
        }
    }

    async fn answer_draft(self, DraftOrder { model, tokens, count, reply }: DraftOrder) {
        let name = model.to_string();
        let drafting = self.draft(model, tokens, count);
        tokio::pin!(drafting);
        let late = match tokio::time::timeout(PATIENCE, &mut drafting).await {
            Ok(Ok(draft)) => return reply.send(draft),
            Ok(Err(error)) => return tracing::debug!(model = name, %error, "the draft model gave no draft"),
            Err(late) => late,
        };
        tracing::debug!(model = name, %late, "the draft model gave no draft");
        drop(reply);
        // The tokens that it computes from now on speed up later drafts.
        let _ = tokio::time::timeout(READING_MAX, drafting).await;
    }

    /// The `count` likeliest tokens after `tokens`, or fewer at the end of the answer.
    async fn draft(&self, model: ModelSpec, tokens: Vec<u32>, count: usize) -> Result<Vec<u32>, RequestError> {
        let request = GenerateRequest {
            model,
            prompt: Prompt::Tokens(tokens),
            params: SamplingParams::greedy(),
            max_tokens: u32::try_from(count).ok(),
            stop: Vec::new(),
        };
        let mut generation = self.generate(request, None)?;
        let mut draft = Vec::with_capacity(count);
        while let Some(event) = generation.next().await {
            if let Generated::Token { sampled, .. } = event? {
                draft.push(sampled.token);
            }
        }
        Ok(draft)
    }

    /// Loads the draft model of `running`, and checks that it can draft.
    ///
    /// # Errors
    /// [`RequestError::BadDraft`] if it has other tokens, or is the same instance; the errors of its load.
    pub(super) async fn ensure_draft(&self, running: &RunningModel, draft: ModelSpec) -> Result<(), RequestError> {
        let draft = self.ensure_alone(draft).await?;
        let what = if draft.id == running.id {
            "it is the same model"
        } else if !running.tokenizer.shares_tokens(&draft.tokenizer) {
            "the two have different tokens"
        } else {
            return Ok(());
        };
        let (model, draft) = (running.name().to_owned(), draft.name().to_owned());
        Err(RequestError::BadDraft { model, draft, what: what.into() })
    }
}
