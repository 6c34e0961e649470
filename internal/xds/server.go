package xds

// The server's steps, the client's from the other side:
//  1. Set and Update (called by istiod-lite/push) change a collection: a type's resources in one scope.
//  2. Every connection (connection.go) takes requests: subscriptions, acks, nacks; a func of the owner's maps its node
//     to a scope for each type.
//  3. Changes wake the connections; each waits a little for more, finds what its client lacks, and sends that, in the
//     order of the types, one push of a type at a time.
//
// Next: internal/xds/client.go.

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// ServerConfig is what a server needs.
type ServerConfig struct {
	// Scope maps a client to the collection of a type that it is given. ctx is the stream's, with what interceptors put
	// there (the authenticated caller). An error ends the stream with it: a client asks for what it may not have.
	Scope func(ctx context.Context, node *core.Node, typeURL string) (string, error)
	// Order are the types in the order they are pushed where several changed; others follow. Policies come before the
	// workloads that list them, clusters before the listeners that name them.
	Order []string
	// Coalesce is how long a push waits for more changes, from the first on; 0 means 10 ms.
	Coalesce time.Duration
	// MaxResponse bounds the bytes of resources in one response, beyond which a push is split; 0 means 16 MiB. One
	// larger resource still goes out whole.
	MaxResponse int
	Log         *zap.Logger
}

// Server pushes collections of resources to the clients connected.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	cfg ServerConfig

	mu          sync.RWMutex
	collections map[collectionKey]*collection
	connections map[*connection]struct{}
	// made is how many collections there have been; each numbers its changes from its own 2^32 on.
	made uint64
}

type collectionKey struct{ typeURL, scope string }

// NewServer makes a server without resources; register it with discovery.RegisterAggregatedDiscoveryServiceServer.
func NewServer(cfg ServerConfig) *Server {
	cfg.Coalesce = cmp.Or(cfg.Coalesce, 10*time.Millisecond)
	cfg.MaxResponse = cmp.Or(cfg.MaxResponse, 16<<20)
	return &Server{
		cfg:         cfg,
		collections: map[collectionKey]*collection{},
		connections: map[*connection]struct{}{},
	}
}

// ServerOptions are the gRPC options a server needs: a client that reconnects names all it has in one request, and that
// may be more than gRPC takes by default (4 MiB, some 40,000 resources).
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxResponse),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}
}

// Set replaces a collection by these resources. A collection exists from its first Set or Update on, also an empty
// one; until then its clients get no answer, so that "synced" is never "nothing was known yet".
func (s *Server) Set(typeURL, scope string, resources []Resource) {
	s.change(typeURL, scope, func(c *collection) bool {
		gone := c.names()
		changed := false
		for _, r := range resources {
			delete(gone, r.Name)
			changed = c.set(r) || changed
		}
		for name := range gone {
			changed = c.remove(name) || changed
		}
		return changed
	})
}

// Update adds or replaces some resources of a collection and removes others, by name. What is as it was is not pushed.
func (s *Server) Update(typeURL, scope string, upserts []Resource, removes []string) {
	s.change(typeURL, scope, func(c *collection) bool {
		changed := false
		for _, name := range removes {
			changed = c.remove(name) || changed
		}
		for _, r := range upserts {
			changed = c.set(r) || changed
		}
		return changed
	})
}

// Drop forgets a scope in all types: its clients keep what they have.
func (s *Server) Drop(scope string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key := range s.collections {
		if key.scope == scope {
			delete(s.collections, key)
		}
	}
}

func (s *Server) change(typeURL, scope string, edit func(*collection) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := collectionKey{typeURL, scope}
	c := s.collections[key]
	changed := c == nil
	if c == nil {
		s.made++
		c = newCollection(s.made << 32)
		s.collections[key] = c
	}
	if !edit(c) && !changed {
		return
	}
	for conn := range s.connections {
		conn.markDirty(key)
	}
}

// DeltaAggregatedResources serves one client until its stream ends.
func (s *Server) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx := stream.Context()
	conn := newConnection(s, stream)
	if p, ok := peer.FromContext(ctx); ok {
		conn.peer = p.Addr.String()
	}
	s.mu.Lock()
	s.connections[conn] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.connections, conn)
		s.mu.Unlock()
	}()
	return conn.serve(ctx)
}

// StreamAggregatedResources refuses the state-of-the-world variant of the protocol.
func (s *Server) StreamAggregatedResources(discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, "only delta xDS is served (api_type: DELTA_GRPC)")
}

// ClientStatus is a connected client as the server sees it.
type ClientStatus struct {
	Node      *core.Node
	Peer      string
	Connected time.Time
	Types     []TypeStatus
}

// TypeStatus is how far a client is with one type.
type TypeStatus struct {
	TypeURL string
	Scope   string
	// Resources is how many the client has been sent and not had removed.
	Resources int
	// Pending: a push has not been answered yet.
	Pending bool
	// Acked is when the client last accepted a push; zero for never.
	Acked time.Time
	// Rejected is the text of the last nack, empty once a later push was accepted.
	Rejected string
}

// Clients are the connected clients, sorted by node id.
func (s *Server) Clients() []ClientStatus {
	s.mu.RLock()
	connections := make([]*connection, 0, len(s.connections))
	for c := range s.connections {
		connections = append(connections, c)
	}
	s.mu.RUnlock()
	out := make([]ClientStatus, 0, len(connections))
	for _, c := range connections {
		out = append(out, c.status())
	}
	slices.SortFunc(out, func(a, b ClientStatus) int {
		return cmp.Or(cmp.Compare(a.Node.GetId(), b.Node.GetId()), a.Connected.Compare(b.Connected))
	})
	return out
}

// scope asks the owner for the client's collection of a type.
func (s *Server) scope(ctx context.Context, node *core.Node, typeURL string) (string, error) {
	scope, err := s.cfg.Scope(ctx, node, typeURL)
	if err != nil {
		if _, ok := status.FromError(err); ok {
			return "", err
		}
		return "", status.Error(codes.PermissionDenied, fmt.Sprintf("%s for node %q: %v", typeURL, node.GetId(), err))
	}
	return scope, nil
}
