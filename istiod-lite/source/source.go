// Package source watches the objects that the mesh is made of: at a Kubernetes API server, or in a directory of the
// same objects. It keeps one informer per kind, its store indexed for the questions the pipeline asks, and tells of each
// change with both the old and the new object.
package source

import (
	"context"
	"fmt"
	"sync"

	"go.uber.org/zap"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Origin is where objects come from.
type Origin interface {
	// ListerWatcher lists and watches the objects of obj's type, in all namespaces.
	ListerWatcher(obj runtime.Object) (cache.ListerWatcher, error)
	// Served calls appear or vanish, from one goroutine, when the kinds of a CustomResourceDefinition ("<plural>.<group>")
	// begin or end to be served. It returns once those that are served now were told of; it goes on until ctx ends.
	Served(ctx context.Context, appear, vanish func(crd string)) error
}

// Sources are the stores of all kinds. Objects in them are shared: read only.
type Sources struct {
	Namespaces           Store[*corev1.Namespace]
	Nodes                Store[*corev1.Node]
	Pods                 Store[*corev1.Pod]
	Services             Store[*corev1.Service]
	EndpointSlices       Store[*discoveryv1.EndpointSlice]
	Deployments          Store[*appsv1.Deployment]
	AuthorizationPolicys Store[*securityv1.AuthorizationPolicy]
	PeerAuthentications  Store[*securityv1.PeerAuthentication]
	Gateways             Store[*gatewayv1.Gateway]
	GatewayClasses       Store[*gatewayv1.GatewayClass]
	HTTPRoutes           Store[*gatewayv1.HTTPRoute]
	GRPCRoutes           Store[*gatewayv1.GRPCRoute]
	ReferenceGrants      Store[*gatewayv1.ReferenceGrant]

	log     *zap.Logger
	origin  Origin
	changed func(Change)
	watches []*watch
}

// Change is what happened to one object: Old is nil for a new one, New for one that is gone.
type Change struct{ Old, New runtime.Object }

// watch is the informer of one kind. An informer cannot be started twice, so that a kind whose definition comes back
// gets a new one.
type watch struct {
	object   runtime.Object
	crd      string // empty for kinds that are always served
	indexers cache.Indexers

	mu       sync.Mutex
	informer cache.SharedIndexInformer
	stop     context.CancelFunc
}

// New prepares the informers; changed is called for each change, from several goroutines, and must not block.
func New(origin Origin, log *zap.Logger, changed func(Change)) *Sources {
	s := &Sources{log: log, origin: origin, changed: changed}
	s.Namespaces = add[*corev1.Namespace](s, &corev1.Namespace{}, "", nil)
	s.Nodes = add[*corev1.Node](s, &corev1.Node{}, "", nil)
	s.Pods = add[*corev1.Pod](s, &corev1.Pod{}, "", cache.Indexers{byNode: podsByNode, byAddress: podsByAddress})
	s.Services = add[*corev1.Service](s, &corev1.Service{}, "", nil)
	s.EndpointSlices = add[*discoveryv1.EndpointSlice](s, &discoveryv1.EndpointSlice{}, "", cache.Indexers{byService: slicesByService})
	s.Deployments = add[*appsv1.Deployment](s, &appsv1.Deployment{}, "", nil)
	s.AuthorizationPolicys = add[*securityv1.AuthorizationPolicy](s, &securityv1.AuthorizationPolicy{}, "authorizationpolicies.security.istio.io", nil)
	s.PeerAuthentications = add[*securityv1.PeerAuthentication](s, &securityv1.PeerAuthentication{}, "peerauthentications.security.istio.io", nil)
	s.Gateways = add[*gatewayv1.Gateway](s, &gatewayv1.Gateway{}, "gateways.gateway.networking.k8s.io", nil)
	s.GatewayClasses = add[*gatewayv1.GatewayClass](s, &gatewayv1.GatewayClass{}, "gatewayclasses.gateway.networking.k8s.io", nil)
	s.HTTPRoutes = add[*gatewayv1.HTTPRoute](s, &gatewayv1.HTTPRoute{}, "httproutes.gateway.networking.k8s.io", nil)
	s.GRPCRoutes = add[*gatewayv1.GRPCRoute](s, &gatewayv1.GRPCRoute{}, "grpcroutes.gateway.networking.k8s.io", nil)
	s.ReferenceGrants = add[*gatewayv1.ReferenceGrant](s, &gatewayv1.ReferenceGrant{}, "referencegrants.gateway.networking.k8s.io", nil)
	return s
}

func add[T runtime.Object](s *Sources, object runtime.Object, crd string, indexers cache.Indexers) Store[T] {
	if indexers == nil {
		indexers = cache.Indexers{}
	}
	indexers[cache.NamespaceIndex] = cache.MetaNamespaceIndexFunc
	w := &watch{object: object, crd: crd, indexers: indexers}
	s.watches = append(s.watches, w)
	return Store[T]{watch: w}
}

// Start runs the informers until ctx ends and returns when every kind that is served has been listed once.
func (s *Sources) Start(ctx context.Context) error {
	for _, w := range s.watches {
		if w.crd == "" {
			if err := s.start(ctx, w); err != nil {
				return err
			}
		}
	}
	appear := func(crd string) {
		for _, w := range s.watches {
			if w.crd != crd {
				continue
			}
			if err := s.start(ctx, w); err != nil {
				s.log.Error("watch kind", zap.String("crd", crd), zap.Error(err))
			}
		}
	}
	vanish := func(crd string) {
		for _, w := range s.watches {
			if w.crd == crd {
				s.end(w)
			}
		}
	}
	if err := s.origin.Served(ctx, appear, vanish); err != nil {
		return err
	}
	var synced []cache.InformerSynced
	for _, w := range s.watches {
		w.mu.Lock()
		if w.informer != nil {
			synced = append(synced, w.informer.HasSynced)
		} else {
			s.log.Info("kind is not served yet: watched from when it is", zap.String("crd", w.crd))
		}
		w.mu.Unlock()
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return fmt.Errorf("list objects: %w", context.Cause(ctx))
	}
	return nil
}

func (s *Sources) start(ctx context.Context, w *watch) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.informer != nil {
		return nil
	}
	lw, err := s.origin.ListerWatcher(w.object)
	if err != nil {
		return err
	}
	informer := cache.NewSharedIndexInformer(lw, w.object, 0, w.indexers)
	if err := informer.SetTransform(slim); err != nil {
		return fmt.Errorf("watch %T: %w", w.object, err)
	}
	if _, err := informer.AddEventHandler(s.handler()); err != nil {
		return fmt.Errorf("watch %T: %w", w.object, err)
	}
	ctx, w.stop = context.WithCancel(ctx)
	w.informer = informer
	go informer.RunWithContext(ctx)
	return nil
}

// end stops watching a kind whose definition is gone, with all its objects.
func (s *Sources) end(w *watch) {
	w.mu.Lock()
	informer := w.informer
	if informer != nil {
		w.stop()
	}
	w.informer = nil
	w.mu.Unlock()
	if informer == nil {
		return
	}
	for _, o := range informer.GetStore().List() {
		s.changed(Change{Old: o.(runtime.Object)})
	}
}

func (s *Sources) handler() cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { s.changed(Change{New: obj.(runtime.Object)}) },
		UpdateFunc: func(old, obj any) {
			s.changed(Change{Old: old.(runtime.Object), New: obj.(runtime.Object)})
		},
		DeleteFunc: func(obj any) {
			if unknown, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = unknown.Obj
			}
			if old, ok := obj.(runtime.Object); ok {
				s.changed(Change{Old: old})
			}
		},
	}
}

// slim drops what nothing here reads and what makes up much of an object: who set which field, and for pods all of the
// containers but their names.
func slim(obj any) (any, error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return obj, nil
	}
	m.SetManagedFields(nil)
	if pod, ok := obj.(*corev1.Pod); ok {
		pod.Spec = corev1.PodSpec{
			NodeName: pod.Spec.NodeName, ServiceAccountName: pod.Spec.ServiceAccountName, HostNetwork: pod.Spec.HostNetwork,
		}
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses = nil, nil
	}
	return obj, nil
}
