//! Draft models: each draft is a short greedy answer of another instance.
//!
//! ```text
//! head ─DraftOrder─► queue ─► task: generate(draft model, all tokens) ─tokens─► head
//! ```
//! The draft model keeps the sequence in its prefix cache, so an answer computes only the tokens since the last one.

use super::{GatewayHandle, Generation};
use crate::core::request::{GenerateRequest, Generated, Prompt, RequestError};
use crate::core::spec::ModelSpec;
use crate::head::DraftOrder;
use crate::planner::RunningModel;
use crate::transport::callback::EventCallback;
use exo_engines::sampler::SamplingParams;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Orders that wait for their task. A task starts at once, so more are never due.
const ORDERS_MAX: usize = 64;
/// Orders that are answered at once, a small part of the requests that this node admits.
const DRAFTS_MAX: usize = 32;
/// How long a sequence waits for its draft. Where a draft model takes longer, it is of little use.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long a draft model may read a sequence behind that: it reads a long prompt once, and later drafts come sooner.
const READING_MAX: Duration = Duration::from_secs(60);

/// The orders of this node's heads.
pub(crate) type DraftOrders = mpsc::Receiver<DraftOrder>;

/// Creates the queue of orders, with the heads' end.
pub(crate) fn draft_orders() -> (EventCallback<DraftOrder>, DraftOrders) {
    let (sender, orders) = mpsc::channel(ORDERS_MAX);
    // An order that is dropped answers that there is no draft; so below.
    (EventCallback::new(move |order| drop(sender.try_send(order))), orders)
}

impl GatewayHandle {
    /// Answers orders until the planner, which holds the heads' end, has stopped.
    pub(super) async fn answer_drafts(self, mut orders: DraftOrders) {
        let permits = Arc::new(Semaphore::new(DRAFTS_MAX));
        while let Some(order) = orders.recv().await {
            if let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
                tokio::spawn(self.clone().answer_draft(order, permit));
            }
        }
    }

    /// Answers with the likeliest tokens that the draft model gives in time.
    async fn answer_draft(self, order: DraftOrder, _permit: OwnedSemaphorePermit) {
        let DraftOrder { model, tokens, count, reply } = order;
        let name = model.to_string();
        let request = GenerateRequest {
            model,
            prompt: Prompt::Tokens(tokens),
            params: SamplingParams::greedy(),
            max_tokens: u32::try_from(count).ok(),
            stop: Vec::new(),
        };
        let mut generation = match self.generate(request, None) {
            Ok(generation) => generation,
            Err(error) => return tracing::debug!(model = name, %error, "the draft model takes no request"),
        };
        let mut draft = Vec::with_capacity(count);
        let collected = tokio::time::timeout(PATIENCE, collect(&mut generation, &mut draft)).await;
        if let Ok(Err(error)) = collected {
            tracing::debug!(model = name, %error, "the draft model failed");
        }
        let is_reading = draft.is_empty();
        reply.send(draft);
        if is_reading {
            let _ = tokio::time::timeout(READING_MAX, collect(&mut generation, &mut Vec::new())).await;
        }
    }

    /// Loads the draft model of `spec`, which stays in memory while the model does; `None` where there is none.
    ///
    /// # Errors
    /// [`RequestError::BadDraft`] if it is the model itself; the errors of its load.
    pub(super) async fn ensure_draft(&self, spec: &ModelSpec) -> Result<Option<RunningModel>, RequestError> {
        let Some(draft) = spec.draft_model() else { return Ok(None) };
        if (&draft.model, draft.quantize) == (&spec.model, spec.quantize) {
            return Err(RequestError::bad_draft(spec, "it is the same model"));
        }
        self.ensure_alone(draft, None).await.map(Some)
    }
}

/// Appends the tokens of an answer to `draft` as they come.
async fn collect(generation: &mut Generation, draft: &mut Vec<u32>) -> Result<(), RequestError> {
    while let Some(event) = generation.next().await {
        if let Generated::Token { sampled, .. } = event? {
            draft.push(sampled.token);
        }
    }
    Ok(())
}
