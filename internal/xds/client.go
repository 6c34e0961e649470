package xds

// The client's steps:
//  1. Subscribe names the types and who takes their resources, before Run.
//  2. Run connects, and tells for each type what it wants and which versions it has.
//  3. A response goes to its handler, and is acked, or nacked with the handler's error.
//  4. When the stream ends, Run waits (with backoff) and goes back to 2.
//
// Next: internal/wire (Decode), internal/state (Apply).

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

const (
	// maxResponse is what a client takes in one response; Istio's control plane sends a type's resources in one.
	maxResponse = 256 << 20
	// firstBackoff and maxBackoff bound the wait between connections.
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 15 * time.Second
	// moreFollows marks (in system_version_info, which other implementations only log) a response that is not the last
	// of its push.
	moreFollows = "fairlead:more"
)

// Handler takes the resources of one type. It is called from one goroutine for all types.
type Handler interface {
	// Apply takes what changed. Where it refuses some of it, it takes the rest all the same, keeps what it had of the
	// refused, and returns the ResourceErrors joined; the response is then nacked with the error's text.
	Apply(updated []Resource, removed []string) error
}

// HandlerFunc is a function as a Handler.
type HandlerFunc func(updated []Resource, removed []string) error

// Apply calls f.
func (f HandlerFunc) Apply(updated []Resource, removed []string) error { return f(updated, removed) }

// ClientConfig is what a client needs.
type ClientConfig struct {
	// Dial gives a connection to the control plane; the client closes it when the stream has ended.
	Dial func(ctx context.Context) (*grpc.ClientConn, error)
	Node *core.Node
	Log  *zap.Logger
}

// Client keeps subscriptions to a control plane.
type Client struct {
	cfg    ClientConfig
	synced chan struct{}

	mu            sync.Mutex
	subscriptions []*subscription
	byType        map[string]*subscription
	connected     bool
	wake          chan struct{} // has one element when wanted names changed
}

// subscription is what the client wants and has of one type.
type subscription struct {
	typeURL string
	handler Handler
	// wanted are the names subscribed to, guarded by Client.mu; unsent are those the server was not told of yet.
	wanted []string
	unsent []string
	// versions are the resources held, by name; only Run's goroutine touches them.
	versions map[string]string
	synced   bool
}

// NewClient makes a client that does nothing until Run.
func NewClient(cfg ClientConfig) *Client {
	return &Client{cfg: cfg, synced: make(chan struct{}), byType: map[string]*subscription{}, wake: make(chan struct{}, 1)}
}

// Subscribe adds a type, before Run. Without names it wants all of the type; requests go out in the order of the calls.
func (c *Client) Subscribe(typeURL string, handler Handler, names ...string) {
	if len(names) == 0 {
		names = []string{Wildcard}
	}
	s := &subscription{typeURL: typeURL, handler: handler, wanted: names, versions: map[string]string{}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subscriptions = append(c.subscriptions, s)
	c.byType[typeURL] = s
}

// Want adds names (or aliases) to a type subscribed to, at any time: this is how a resource is asked for on demand.
// The server answers with the resource, or with its removal where there is none.
func (c *Client) Want(typeURL string, names ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.byType[typeURL]
	if s == nil {
		return
	}
	for _, name := range names {
		if !slices.Contains(s.wanted, name) {
			s.wanted = append(s.wanted, name)
			s.unsent = append(s.unsent, name)
		}
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Synced is closed when every type has been answered once, completely.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Connected tells whether a stream is open now.
func (c *Client) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connected
}

// Run keeps a stream open until ctx ends, and returns ctx's error. What was received stays with the handlers while the
// control plane is away.
func (c *Client) Run(ctx context.Context) error {
	backoff := firstBackoff
	for {
		received, err := c.stream(ctx)
		c.setConnected(false)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if received {
			backoff = firstBackoff
		}
		// Half of the wait is left to chance, so that the nodes of a mesh do not come back all at once.
		wait := backoff/2 + rand.N(backoff/2)
		c.cfg.Log.Warn("xds stream ended, reconnecting", zap.Error(err), zap.Duration("wait", wait))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// stream runs one connection to its end. received tells whether the server answered at all.
func (c *Client) stream(ctx context.Context) (received bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := c.cfg.Dial(ctx)
	if err != nil {
		return false, fmt.Errorf("dial control plane: %w", err)
	}
	defer conn.Close()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).
		DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(maxResponse))
	if err != nil {
		return false, fmt.Errorf("open stream: %w", err)
	}
	responses := make(chan *discovery.DeltaDiscoveryResponse)
	failed := make(chan error, 1)
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- response:
			case <-ctx.Done():
				return
			}
		}
	}()
	// Reading has begun, so that a long request and a long response do not wait for each other.
	if err := c.sendInitial(stream); err != nil {
		return false, fmt.Errorf("subscribe: %w", err)
	}
	for {
		select {
		case response := <-responses:
			received = true
			c.setConnected(true)
			if err := c.handle(stream, response); err != nil {
				return received, err
			}
		case <-c.wake:
			if err := c.sendWanted(stream); err != nil {
				return received, err
			}
		case err := <-failed:
			return received, err
		case <-ctx.Done(): // which the reader may have seen instead of handing its response over
			return received, ctx.Err()
		}
	}
}

func (c *Client) setConnected(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connected = on
}

type clientStream interface {
	Send(*discovery.DeltaDiscoveryRequest) error
}

// sendInitial tells the server what is wanted and held of each type. The node goes with the first request only, as
// the protocol has it.
func (c *Client) sendInitial(stream clientStream) error {
	c.mu.Lock()
	requests := make([]*discovery.DeltaDiscoveryRequest, 0, len(c.subscriptions))
	for i, s := range c.subscriptions {
		s.unsent = nil
		request := &discovery.DeltaDiscoveryRequest{
			TypeUrl:                 s.typeURL,
			ResourceNamesSubscribe:  slices.Clone(s.wanted),
			InitialResourceVersions: s.versions,
		}
		if i == 0 {
			request.Node = c.cfg.Node
		}
		requests = append(requests, request)
	}
	c.mu.Unlock()
	for _, request := range requests {
		if err := stream.Send(request); err != nil {
			return err
		}
	}
	return nil
}

// sendWanted tells the server the names that were added since.
func (c *Client) sendWanted(stream clientStream) error {
	c.mu.Lock()
	var requests []*discovery.DeltaDiscoveryRequest
	for _, s := range c.subscriptions {
		if len(s.unsent) > 0 {
			requests = append(requests, &discovery.DeltaDiscoveryRequest{TypeUrl: s.typeURL, ResourceNamesSubscribe: s.unsent})
			s.unsent = nil
		}
	}
	c.mu.Unlock()
	for _, request := range requests {
		if err := stream.Send(request); err != nil {
			return fmt.Errorf("subscribe: %w", err)
		}
	}
	return nil
}

// handle gives a response to its handler and answers it.
func (c *Client) handle(stream clientStream, response *discovery.DeltaDiscoveryResponse) error {
	c.mu.Lock()
	s := c.byType[response.GetTypeUrl()]
	c.mu.Unlock()
	if s == nil {
		return fmt.Errorf("response of type %q, which was not asked for", response.GetTypeUrl())
	}
	answer := &discovery.DeltaDiscoveryRequest{TypeUrl: s.typeURL, ResponseNonce: response.GetNonce()}
	if err := c.apply(s, response); err != nil {
		c.cfg.Log.Error("xds resources refused", zap.String("type", s.typeURL), zap.Error(err))
		answer.ErrorDetail = &status.Status{Code: int32(codes.InvalidArgument), Message: err.Error()}
	}
	if err := stream.Send(answer); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	if response.GetSystemVersionInfo() != moreFollows {
		c.noteSynced(s)
	}
	return nil
}

// apply calls the handler and notes the versions that are now held: a refused resource keeps the version of what is
// in force, so that a later stream is sent the newer one again.
func (c *Client) apply(s *subscription, response *discovery.DeltaDiscoveryResponse) error {
	var wrongType error
	updated := fromWire(response)
	updated = slices.DeleteFunc(updated, func(r Resource) bool {
		if r.Body.GetTypeUrl() == s.typeURL {
			return false
		}
		wrongType = errors.Join(wrongType, &ResourceError{r.Name, fmt.Errorf("body of type %q", r.Body.GetTypeUrl())})
		return true
	})
	removed := response.GetRemovedResources()
	if len(updated)+len(removed) == 0 {
		return wrongType
	}
	err := s.handler.Apply(updated, removed)
	kept, all := refused(err)
	for _, r := range updated {
		if !all && !kept[r.Name] {
			s.versions[r.Name] = r.Version
		}
	}
	for _, name := range removed {
		delete(s.versions, name)
	}
	return errors.Join(err, wrongType)
}

// noteSynced closes Synced once every type has been answered.
func (c *Client) noteSynced(s *subscription) {
	if s.synced {
		return
	}
	s.synced = true
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, other := range c.subscriptions {
		if !other.synced {
			return
		}
	}
	close(c.synced)
}
