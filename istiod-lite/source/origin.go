package source

import (
	"context"
	"fmt"
	"sync"

	"go.uber.org/zap"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	istioclient "istio.io/client-go/pkg/clientset/versioned"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	watchapi "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/fairlead-mesh/fairlead/internal/kubedir"
)

// Clients are those of one Kubernetes cluster.
type Clients struct {
	Kubernetes kubernetes.Interface
	Istio      istioclient.Interface
	Gateway    gatewayclient.Interface
	Metadata   metadata.Interface
}

// Cluster is the origin that is a Kubernetes API server.
type Cluster struct {
	Clients
	Log *zap.Logger
}

// ListerWatcher lists and watches at the API server.
func (c Cluster) ListerWatcher(obj runtime.Object) (cache.ListerWatcher, error) {
	var getter cache.Getter
	var resource string
	switch obj.(type) {
	case *corev1.Namespace:
		getter, resource = c.Kubernetes.CoreV1().RESTClient(), "namespaces"
	case *corev1.Node:
		getter, resource = c.Kubernetes.CoreV1().RESTClient(), "nodes"
	case *corev1.Pod:
		getter, resource = c.Kubernetes.CoreV1().RESTClient(), "pods"
	case *corev1.Service:
		getter, resource = c.Kubernetes.CoreV1().RESTClient(), "services"
	case *discoveryv1.EndpointSlice:
		getter, resource = c.Kubernetes.DiscoveryV1().RESTClient(), "endpointslices"
	case *appsv1.Deployment:
		getter, resource = c.Kubernetes.AppsV1().RESTClient(), "deployments"
	case *securityv1.AuthorizationPolicy:
		getter, resource = c.Istio.SecurityV1().RESTClient(), "authorizationpolicies"
	case *securityv1.PeerAuthentication:
		getter, resource = c.Istio.SecurityV1().RESTClient(), "peerauthentications"
	case *gatewayv1.Gateway:
		getter, resource = c.Gateway.GatewayV1().RESTClient(), "gateways"
	case *gatewayv1.GatewayClass:
		getter, resource = c.Gateway.GatewayV1().RESTClient(), "gatewayclasses"
	case *gatewayv1.HTTPRoute:
		getter, resource = c.Gateway.GatewayV1().RESTClient(), "httproutes"
	case *gatewayv1.GRPCRoute:
		getter, resource = c.Gateway.GatewayV1().RESTClient(), "grpcroutes"
	case *gatewayv1.ReferenceGrant:
		getter, resource = c.Gateway.GatewayV1().RESTClient(), "referencegrants"
	default:
		return nil, fmt.Errorf("no client for %T", obj)
	}
	return cache.NewListWatchFromClient(getter, resource, metav1.NamespaceAll, fields.Everything()), nil
}

// Served follows the cluster's CustomResourceDefinitions.
func (c Cluster) Served(ctx context.Context, appear, vanish func(crd string)) error {
	crds := c.Metadata.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return crds.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watchapi.Interface, error) { return crds.Watch(ctx, o) },
	}, c.Metadata)
	informer := cache.NewSharedIndexInformer(lw, &metav1.PartialObjectMetadata{}, 0, cache.Indexers{})
	// One lock instead of one goroutine: start and stop of a kind must not cross.
	var mu sync.Mutex
	told := func(f func(string), obj any) {
		mu.Lock()
		defer mu.Unlock()
		if unknown, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = unknown.Obj
		}
		if m, ok := obj.(metav1.Object); ok {
			f(m.GetName())
		}
	}
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { told(appear, obj) },
		DeleteFunc: func(obj any) { told(vanish, obj) },
	})
	if err != nil {
		return fmt.Errorf("watch CustomResourceDefinitions: %w", err)
	}
	go informer.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		return fmt.Errorf("list CustomResourceDefinitions: %w", context.Cause(ctx))
	}
	return nil
}

// Directory is the origin that is a directory of YAML files, where every kind is served.
type Directory struct{ *kubedir.Dir }

// ListerWatcher lists and watches the directory.
func (d Directory) ListerWatcher(obj runtime.Object) (cache.ListerWatcher, error) {
	return d.Dir.ListerWatcher(obj), nil
}

// Served names every kind that on a cluster comes from a CustomResourceDefinition.
func (d Directory) Served(_ context.Context, appear, _ func(crd string)) error {
	for _, crd := range []string{
		"authorizationpolicies.security.istio.io", "peerauthentications.security.istio.io",
		"gateways.gateway.networking.k8s.io", "gatewayclasses.gateway.networking.k8s.io",
		"httproutes.gateway.networking.k8s.io", "grpcroutes.gateway.networking.k8s.io", "referencegrants.gateway.networking.k8s.io",
	} {
		appear(crd)
	}
	return nil
}
