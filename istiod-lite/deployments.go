package istiod

import (
	"context"
	"errors"
	"maps"
	"time"

	"go.uber.org/zap"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/workqueue"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/istiod-lite/deploy"
	"github.com/fairlead-mesh/fairlead/istiod-lite/source"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

// deployments keeps what waypoints run as, in step with their Gateways: it is the retrying around istiod-lite/deploy.
type deployments struct {
	deployer *deploy.Deployer
	sources  *source.Sources
	log      *zap.Logger
	queue    workqueue.TypedRateLimitingInterface[name]
}

// pruneAll is the queue's word for "look for what no Gateway asks for any more".
var pruneAll = name{}

func newDeployments(d *deploy.Deployer, s *source.Sources, log *zap.Logger) *deployments {
	limiter := workqueue.NewTypedItemExponentialFailureRateLimiter[name](100*time.Millisecond, time.Minute)
	return &deployments{deployer: d, sources: s, log: log, queue: workqueue.NewTypedRateLimitingQueue(limiter)}
}

// note queues a Gateway when it, or what it is deployed as, was changed by someone.
func (d *deployments) note(c source.Change) {
	obj := c.New
	if obj == nil {
		obj = c.Old
	}
	m, ok := obj.(metav1.Object)
	if !ok {
		return
	}
	switch obj.(type) {
	case *gatewayv1.Gateway:
		if !sameGeneration(c) {
			d.queue.Add(nameOf(m))
			d.queue.Add(pruneAll)
		}
	case *appsv1.Deployment, *corev1.Service:
		if gateway := m.GetLabels()[gatewayNameLabel]; gateway != "" && !sameGeneration(c) {
			d.queue.Add(name{Namespace: m.GetNamespace(), Name: gateway})
		}
	}
}

// sameGeneration tells whether a change is one of status only; labels and annotations count as more than that.
func sameGeneration(c source.Change) bool {
	old, okOld := c.Old.(metav1.Object)
	next, okNew := c.New.(metav1.Object)
	if !okOld || !okNew || old.GetGeneration() != next.GetGeneration() || old.GetGeneration() == 0 {
		return false
	}
	return maps.Equal(old.GetLabels(), next.GetLabels()) && maps.Equal(old.GetAnnotations(), next.GetAnnotations())
}

// Run deploys until ctx ends.
func (d *deployments) Run(ctx context.Context) {
	context.AfterFunc(ctx, d.queue.ShutDown)
	d.queue.Add(pruneAll)
	for {
		key, shutdown := d.queue.Get()
		if shutdown {
			return
		}
		if err := d.ensure(ctx, key); err != nil && !errors.Is(err, context.Canceled) {
			d.log.Warn("deploy waypoint", zap.Stringer("gateway", key), zap.Error(err))
			d.queue.AddRateLimited(key)
		} else {
			d.queue.Forget(key)
		}
		d.queue.Done(key)
	}
}

func (d *deployments) ensure(ctx context.Context, key name) error {
	if key == pruneAll {
		return d.deployer.Prune(ctx, d.waypoints())
	}
	gw, ok := d.sources.Gateways.Get(key.Namespace, key.Name)
	if !ok || gw.DeletionTimestamp != nil || gw.Spec.GatewayClassName != translate.WaypointClass {
		return nil
	}
	return d.deployer.Ensure(ctx, gw)
}

func (d *deployments) waypoints() []*gatewayv1.Gateway {
	var out []*gatewayv1.Gateway
	for _, gw := range d.sources.Gateways.List() {
		if gw.Spec.GatewayClassName == translate.WaypointClass {
			out = append(out, gw)
		}
	}
	return out
}
