// Package deploy keeps what a waypoint runs as: for each Gateway of class istio-waypoint a Deployment, a Service and a
// ServiceAccount, named after the Gateway and owned by it. Ensure and Prune are idempotent; retrying is the caller's.
package deploy

import (
	"context"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Config is what the objects of every waypoint have in common.
type Config struct {
	// Image of the waypoint.
	Image string
	// SystemNamespace is where istiod runs.
	SystemNamespace string
	ClusterID       string
	TrustDomain     string
	Network         string
	// Revision is written as istio.io/rev; empty means none.
	Revision string
}

// Deployer acts on one cluster. Make it with New.
type Deployer struct {
	client kubernetes.Interface
	cfg    Config
}

// New makes a Deployer; it does nothing until it is called.
func New(client kubernetes.Interface, cfg Config) *Deployer {
	return &Deployer{client: client, cfg: cfg}
}

// Class is the GatewayClass whose Gateways are waypoints.
const Class = "istio-waypoint"

// Ensure applies the objects of gw, by server-side apply. It is cheap to call again: nothing changes at the API server
// when nothing differs.
func (d *Deployer) Ensure(ctx context.Context, gw *gatewayv1.Gateway) error { return nil }

// Prune removes the objects that Ensure once made for Gateways that are not among the waypoints now (Gateways that have
// gone, or have another class).
func (d *Deployer) Prune(ctx context.Context, waypoints []*gatewayv1.Gateway) error { return nil }

// Status is what the Gateway's status becomes: addresses, and the conditions Accepted and Programmed. svc and dep are
// what the informers have of the objects Ensure made, nil when there is none (yet). It is a pure function; now becomes
// the transition time of conditions that differ from the Gateway's present ones.
func Status(gw *gatewayv1.Gateway, svc *corev1.Service, dep *appsv1.Deployment, now metav1.Time) gatewayv1.GatewayStatus {
	return gw.Status
}
