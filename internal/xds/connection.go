package xds

import (
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// requestQueue is how many requests may wait while a response is being sent. A client sends one a type and one answer a
// response; were there no room for those, both ends could wait for the other to read.
const requestQueue = 64

// connection is one client's stream. Its serve goroutine alone sends and changes what the client wants and has; mu is
// for those who look (Clients) and those who wake it (markDirty).
type connection struct {
	server    *Server
	stream    discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	peer      string
	connected time.Time
	wake      chan struct{} // has one element when some type is dirty

	mu    sync.Mutex
	node  *core.Node
	types map[string]*watch
	nonce uint64
}

// watch is what a client wants and has of one type.
type watch struct {
	typeURL string
	key     collectionKey
	// dirty: the collection, or what the client wants of it, changed since the last push.
	dirty bool
	// answered: the first response of this type has been sent.
	answered bool
	wildcard bool
	// names subscribed to one by one (names or aliases).
	names map[string]struct{}
	// asked are the names to answer in the next push even where there is nothing of that name, or (true) where the
	// client has it already: it subscribed to it again.
	asked map[string]bool
	// sent are the versions the client has.
	sent map[string]string
	// seen is the number of the first change of the collection that the client was not told of; all that came before
	// is in sent. compare: the wants changed, or nothing was sent yet, so everything wanted is compared.
	seen    uint64
	compare bool
	// pending are the nonces not yet answered.
	pending  map[string]struct{}
	acked    time.Time
	rejected string
}

func newConnection(s *Server, stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) *connection {
	return &connection{
		server: s, stream: stream, connected: time.Now(),
		wake: make(chan struct{}, 1), types: map[string]*watch{},
	}
}

// markDirty is called with the server's lock held.
func (c *connection) markDirty(key collectionKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w := c.types[key.typeURL]; w != nil && w.key == key {
		w.dirty = true
		c.wakeUp()
	}
}

func (c *connection) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *connection) serve(ctx context.Context) error {
	requests := make(chan *discovery.DeltaDiscoveryRequest, requestQueue)
	failed := make(chan error, 1)
	go func() {
		for {
			request, err := c.stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- request:
			case <-ctx.Done():
				return
			}
		}
	}()
	var pushAt <-chan time.Time
	for {
		select {
		case request := <-requests:
			if err := c.receive(ctx, request); err != nil {
				return err
			}
		case <-c.wake:
			if pushAt == nil {
				pushAt = time.After(c.server.cfg.Coalesce)
			}
		case <-pushAt:
			pushAt = nil
			if err := c.push(); err != nil {
				return err
			}
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// receive takes a request: the first of a type, a change of what is wanted, an ack or a nack, or several of these.
func (c *connection) receive(ctx context.Context, request *discovery.DeltaDiscoveryRequest) error {
	c.mu.Lock()
	if c.node == nil {
		c.node = request.GetNode()
	}
	node, w := c.node, c.types[request.GetTypeUrl()]
	c.mu.Unlock()
	if node == nil {
		return status.Error(codes.InvalidArgument, "the first request names no node")
	}
	if w == nil {
		scope, err := c.server.scope(ctx, node, request.GetTypeUrl())
		if err != nil {
			return err
		}
		w = newWatch(request, scope)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.types[w.typeURL] = w
	if nonce := request.GetResponseNonce(); nonce != "" {
		c.answered(w, nonce, request)
	}
	if w.subscribe(request) {
		w.dirty, w.compare = true, true
	}
	if w.dirty && len(w.pending) == 0 {
		c.wakeUp()
	}
	return nil
}

// newWatch starts from what the client says it has from an earlier stream.
func newWatch(first *discovery.DeltaDiscoveryRequest, scope string) *watch {
	sent := maps.Clone(first.GetInitialResourceVersions())
	if sent == nil {
		sent = map[string]string{}
	}
	return &watch{
		typeURL: first.GetTypeUrl(), key: collectionKey{first.GetTypeUrl(), scope},
		// A first request without names wants everything, as older clients say it.
		wildcard: len(first.GetResourceNamesSubscribe()) == 0,
		dirty:    true, compare: true,
		names: map[string]struct{}{}, asked: map[string]bool{}, sent: sent, pending: map[string]struct{}{},
	}
}

// answered notes the client's answer to a push.
func (c *connection) answered(w *watch, nonce string, request *discovery.DeltaDiscoveryRequest) {
	if _, ok := w.pending[nonce]; !ok {
		return
	}
	delete(w.pending, nonce)
	if detail := request.GetErrorDetail(); detail != nil {
		w.rejected = detail.GetMessage()
		c.server.cfg.Log.Warn("xds push refused by its client",
			zap.String("node", c.node.GetId()), zap.String("type", w.typeURL), zap.String("error", w.rejected))
		return
	}
	w.acked = time.Now()
	if len(w.pending) == 0 {
		w.rejected = ""
	}
}

// subscribe changes what is wanted and tells whether that needs a push.
func (w *watch) subscribe(request *discovery.DeltaDiscoveryRequest) bool {
	for _, name := range request.GetResourceNamesUnsubscribe() {
		if name == Wildcard {
			w.wildcard = false
			continue
		}
		delete(w.names, name)
		if !w.wildcard {
			delete(w.sent, name)
		}
	}
	for _, name := range request.GetResourceNamesSubscribe() {
		if name == Wildcard {
			w.wildcard = true
			continue
		}
		w.names[name] = struct{}{}
		w.asked[name] = w.answered
	}
	return len(request.GetResourceNamesSubscribe()) > 0
}

// push sends, type by type, what the client lacks. A type whose last push is not answered yet waits for the answer,
// gathering further changes meanwhile.
func (c *connection) push() error {
	for _, w := range c.dirtyInOrder() {
		responses := c.prepare(w)
		for _, response := range responses {
			if err := c.stream.Send(response); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *connection) dirtyInOrder() []*watch {
	c.mu.Lock()
	defer c.mu.Unlock()
	var dirty []*watch
	for _, w := range c.types {
		if w.dirty && len(w.pending) == 0 {
			dirty = append(dirty, w)
		}
	}
	rank := func(w *watch) int {
		if at := slices.Index(c.server.cfg.Order, w.typeURL); at >= 0 {
			return at
		}
		return len(c.server.cfg.Order)
	}
	slices.SortFunc(dirty, func(a, b *watch) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.typeURL, b.typeURL))
	})
	return dirty
}

// prepare finds what the client lacks of a type and notes it as sent.
func (c *connection) prepare(w *watch) []*discovery.DeltaDiscoveryResponse {
	c.server.mu.RLock()
	defer c.server.mu.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	collection := c.server.collections[w.key]
	if collection == nil {
		w.dirty = false // the collection's first Set marks it again
		return nil
	}
	updated, removed := w.lacks(collection)
	w.dirty, w.compare, w.seen = false, false, collection.now()
	clear(w.asked)
	if len(updated)+len(removed) == 0 && w.answered {
		return nil
	}
	w.answered = true
	for _, r := range updated {
		w.sent[r.Name] = r.Version
	}
	for _, name := range removed {
		delete(w.sent, name)
	}
	responses := split(w.typeURL, updated, removed, c.server.cfg.MaxResponse)
	for _, response := range responses {
		c.nonce++
		response.Nonce = strconv.FormatUint(c.nonce, 10)
		w.pending[response.Nonce] = struct{}{}
	}
	return responses
}

// lacks are the resources the client wants and does not have as they are, and the names it has and should not, or
// asked for in vain.
func (w *watch) lacks(c *collection) (updated []Resource, removed []string) {
	names, ok := c.since(w.seen)
	if w.compare || !ok {
		names = w.everything(c)
	}
	for name := range names {
		r, exists := c.resources[name]
		version, has := w.sent[name]
		switch {
		case exists && w.wants(r):
			if version != r.Version {
				updated = append(updated, r)
			}
		case has:
			removed = append(removed, name)
		}
	}
	for name, again := range w.asked {
		r, exists := c.resolve(name)
		switch {
		case !exists && !slices.Contains(removed, name):
			removed = append(removed, name)
		case exists && again && w.sent[r.Name] == r.Version:
			updated = append(updated, r)
		}
	}
	slices.SortFunc(updated, func(a, b Resource) int { return cmp.Compare(a.Name, b.Name) })
	updated = slices.CompactFunc(updated, func(a, b Resource) bool { return a.Name == b.Name })
	slices.Sort(removed)
	return updated, removed
}

// everything are the names to compare when changes alone do not tell: all the client has, and all it wants.
func (w *watch) everything(c *collection) map[string]struct{} {
	names := map[string]struct{}{}
	if w.wildcard {
		names = c.names()
	}
	for name := range w.sent {
		names[name] = struct{}{}
	}
	for name := range w.names {
		if r, ok := c.resolve(name); ok {
			names[r.Name] = struct{}{}
		}
	}
	return names
}

func (w *watch) wants(r Resource) bool {
	if w.wildcard {
		return true
	}
	if _, ok := w.names[r.Name]; ok {
		return true
	}
	return slices.ContainsFunc(r.Aliases, func(alias string) bool {
		_, ok := w.names[alias]
		return ok
	})
}

// split makes the responses of one push, of at most limit bytes of resources each; all but the last are marked.
func split(typeURL string, updated []Resource, removed []string, limit int) []*discovery.DeltaDiscoveryResponse {
	response := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
	responses := []*discovery.DeltaDiscoveryResponse{response}
	size := 0
	for _, r := range updated {
		wire := r.toWire()
		if n := proto.Size(wire); size > 0 && size+n > limit {
			response.SystemVersionInfo = moreFollows
			response = &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
			responses = append(responses, response)
			size = n
		} else {
			size += n
		}
		response.Resources = append(response.Resources, wire)
	}
	// Removals come last: until the new is there, the old is better than nothing.
	response.RemovedResources = removed
	return responses
}

func (c *connection) status() ClientStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := ClientStatus{Node: c.node, Peer: c.peer, Connected: c.connected}
	for _, w := range c.types {
		out.Types = append(out.Types, TypeStatus{
			TypeURL: w.typeURL, Scope: w.key.scope, Resources: len(w.sent),
			Pending: len(w.pending) > 0, Acked: w.acked, Rejected: w.rejected,
		})
	}
	slices.SortFunc(out.Types, func(a, b TypeStatus) int { return cmp.Compare(a.TypeURL, b.TypeURL) })
	return out
}
