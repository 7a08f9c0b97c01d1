//! Streams: passes a stream that a peer opened to the actor that handles it.

use super::probe;
use crate::gateway::{GatewayMsg, RemoteRequest};
use crate::models::{ModelsMsg, ModelsRef};
use crate::transport::protocol::DataHello;
use crate::worker::links::{self, LinkRegistry};
use exo_net::{DataStream, NodeId};
use ractor::ActorRef;
use std::time::Duration;

/// The time from the opening of a stream to its first frame.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// The actors that handle peers' streams.
#[derive(Debug, Clone)]
pub(super) struct StreamHandlers {
    pub(super) link_registry: LinkRegistry,
    pub(super) gateway: ActorRef<GatewayMsg>,
    pub(super) models: ModelsRef,
}

/// Reads the purpose of a peer's stream from its first frame, and passes the stream to the actor that handles it.
pub(super) async fn serve(from: NodeId, mut stream: DataStream, handlers: StreamHandlers) {
    let first = stream.reader.receive::<DataHello>(|_, announced| match announced {
        exo_net::Announced::Nothing => Ok(()),
        _ => Err("the first frame of the stream has a payload".to_owned()),
    });
    match tokio::time::timeout(HELLO_DEADLINE, first).await {
        Ok(Ok(Some((DataHello::Link(hello), _)))) => links::serve(handlers.link_registry, from, hello, stream).await,
        Ok(Ok(Some((DataHello::Request { instance, request }, _)))) => {
            // If the gateway has stopped, the node stops, too.
            let _ = handlers
                .gateway
                .send_message(GatewayMsg::Serve { request: RemoteRequest { from, instance, request }, stream });
        }
        Ok(Ok(Some((DataHello::Weights(request), _)))) => {
            drop(handlers.models.send_message(ModelsMsg::Serve { request, stream }));
        }
        Ok(Ok(Some((DataHello::Probe, _)))) => probe::serve(stream).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => {
            tracing::info!(peer = %from, %error, "refused a peer's stream");
            stream.give_up();
        }
        Err(_) => stream.give_up(),
    }
}
