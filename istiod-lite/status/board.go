// Package status reports on users' objects what became of them. The pipeline says what each object's conditions are to
// be; the Board writes those that differ, to the API server or, where configuration is a directory, to files beside it.
package status

import (
	"context"
	"reflect"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"k8s.io/client-go/util/workqueue"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Object names an object that has a status.
type Object struct {
	// Kind is AuthorizationPolicy, Service, Gateway, GatewayClass, HTTPRoute or GRPCRoute.
	Kind, Namespace, Name string
}

// String is "<kind> <namespace>/<name>".
func (o Object) String() string { return o.Kind + " " + o.Namespace + "/" + o.Name }

// Desired is what an object's status is to say.
type Desired struct {
	Conditions []Condition
	// Gateway is the whole status of a Gateway, instead of conditions; nil for other kinds.
	Gateway *gatewayv1.GatewayStatus
}

// Writer makes an object's status what it is to be. It writes nothing when nothing differs or the object is gone.
type Writer interface {
	Write(ctx context.Context, o Object, want Desired) error
}

// Board is what all objects' statuses are to be. It is safe for concurrent use.
type Board struct {
	writer Writer
	log    *zap.Logger
	queue  workqueue.TypedRateLimitingInterface[Object]

	mu   sync.Mutex
	said map[Object]map[string]Desired // by producer
}

// NewBoard makes a Board; Run writes.
func NewBoard(writer Writer, log *zap.Logger) *Board {
	limiter := workqueue.NewTypedItemExponentialFailureRateLimiter[Object](20*time.Millisecond, time.Minute)
	return &Board{writer: writer, log: log, queue: workqueue.NewTypedRateLimitingQueue(limiter), said: map[Object]map[string]Desired{}}
}

// Set is what one producer has to say of an object; the zero Desired: nothing, and what it said before goes.
func (b *Board) Set(producer string, o Object, want Desired) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old, known := b.said[o][producer]
	if known && reflect.DeepEqual(old, want) {
		return
	}
	if b.said[o] == nil {
		b.said[o] = map[string]Desired{}
	}
	b.said[o][producer] = want
	b.queue.Add(o)
}

// Forget is called for an object that is gone.
func (b *Board) Forget(o Object) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, known := b.said[o]; known {
		delete(b.said, o)
		b.queue.Add(o)
	}
}

// Run writes until ctx ends.
func (b *Board) Run(ctx context.Context) {
	context.AfterFunc(ctx, b.queue.ShutDown)
	for {
		o, shutdown := b.queue.Get()
		if shutdown {
			return
		}
		if err := b.writer.Write(ctx, o, b.desired(o)); err != nil && ctx.Err() == nil {
			b.log.Debug("write status; tried again soon", zap.Stringer("object", o), zap.Error(err))
			if b.queue.NumRequeues(o) == 5 {
				b.log.Warn("status cannot be written", zap.Stringer("object", o), zap.Error(err))
			}
			b.queue.AddRateLimited(o)
		} else {
			b.queue.Forget(o)
		}
		b.queue.Done(o)
	}
}

// desired joins what the producers said.
func (b *Board) desired(o Object) Desired {
	b.mu.Lock()
	defer b.mu.Unlock()
	producers := make([]string, 0, len(b.said[o]))
	for p := range b.said[o] {
		producers = append(producers, p)
	}
	slices.Sort(producers)
	var out Desired
	for _, p := range producers {
		d := b.said[o][p]
		out.Conditions = append(out.Conditions, d.Conditions...)
		if d.Gateway != nil {
			out.Gateway = d.Gateway
		}
	}
	return out
}
