// Package deploy keeps what a waypoint runs as: for each Gateway of class istio-waypoint a Deployment, a Service and a
// ServiceAccount, named after the Gateway and owned by it. Ensure and Prune are idempotent; retrying is the caller's.
package deploy

import (
	"context"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
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

// Labels of what is deployed. Dashboards find waypoints by managedLabel; managedByLabel tells ours from another's.
const (
	managedLabel      = "gateway.istio.io/managed"
	managedController = "istio.io-mesh-controller"
	gatewayLabel      = "gateway.networking.k8s.io/gateway-name"
	classLabel        = "gateway.networking.k8s.io/gateway-class-name"
	managedByLabel    = "app.kubernetes.io/managed-by"
	managedBy         = "fairlead"
	fieldManager      = "fairlead-istiod"
)

// Ensure applies the objects of gw, by server-side apply. Nothing changes at the API server when nothing differs. An
// object of the same name that somebody else made is left alone, and named in the error.
func (d *Deployer) Ensure(ctx context.Context, gw *gatewayv1.Gateway) error {
	name := types.NamespacedName{Namespace: gw.Namespace, Name: gw.Name}
	options := metav1.ApplyOptions{FieldManager: fieldManager, Force: true}
	core, apps := d.client.CoreV1(), d.client.AppsV1()

	account, err := core.ServiceAccounts(name.Namespace).Get(ctx, name.Name, metav1.GetOptions{})
	if err := free("ServiceAccount", account, err); err != nil {
		return err
	}
	service, err := core.Services(name.Namespace).Get(ctx, name.Name, metav1.GetOptions{})
	if err := free("Service", service, err); err != nil {
		return err
	}
	deployment, err := apps.Deployments(name.Namespace).Get(ctx, name.Name, metav1.GetOptions{})
	if err := free("Deployment", deployment, err); err != nil {
		return err
	}
	if _, err := core.ServiceAccounts(name.Namespace).Apply(ctx, d.serviceAccount(gw), options); err != nil {
		return fmt.Errorf("apply ServiceAccount %s: %w", name, err)
	}
	if _, err := core.Services(name.Namespace).Apply(ctx, d.service(gw), options); err != nil {
		return fmt.Errorf("apply Service %s: %w", name, err)
	}
	if _, err := apps.Deployments(name.Namespace).Apply(ctx, d.deployment(gw), options); err != nil {
		return fmt.Errorf("apply Deployment %s: %w", name, err)
	}
	return nil
}

// free tells whether the name of an object may be used: nobody has it, or it is a waypoint's already.
func free(kind string, o metav1.Object, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("look for %s: %w", kind, err)
	case o.GetLabels()[managedLabel] != managedController:
		return fmt.Errorf("%s %s/%s exists and is not a waypoint's: rename the Gateway or delete it", kind, o.GetNamespace(), o.GetName())
	default:
		return nil
	}
}

// Prune removes the objects that Ensure once made for Gateways that are not among the waypoints now (Gateways that have
// gone, or have another class).
func (d *Deployer) Prune(ctx context.Context, waypoints []*gatewayv1.Gateway) error {
	keep := map[types.NamespacedName]struct{}{}
	for _, gw := range waypoints {
		keep[types.NamespacedName{Namespace: gw.Namespace, Name: gw.Name}] = struct{}{}
	}
	ours := metav1.ListOptions{LabelSelector: managedLabel + "=" + managedController + "," + managedByLabel + "=" + managedBy}
	core, apps := d.client.CoreV1(), d.client.AppsV1()
	var errs []error
	remove := func(kind string, o metav1.Object, del func(context.Context, string, metav1.DeleteOptions) error) {
		if _, ok := keep[types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetLabels()[gatewayLabel]}]; ok {
			return
		}
		uid := o.GetUID()
		err := del(ctx, o.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("remove %s %s/%s: %w", kind, o.GetNamespace(), o.GetName(), err))
		}
	}
	deployments, err := apps.Deployments("").List(ctx, ours)
	if err != nil {
		return fmt.Errorf("list deployments: %w", err)
	}
	for i := range deployments.Items {
		o := &deployments.Items[i]
		remove("Deployment", o, apps.Deployments(o.Namespace).Delete)
	}
	services, err := core.Services("").List(ctx, ours)
	if err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	for i := range services.Items {
		o := &services.Items[i]
		remove("Service", o, core.Services(o.Namespace).Delete)
	}
	accounts, err := core.ServiceAccounts("").List(ctx, ours)
	if err != nil {
		return fmt.Errorf("list service accounts: %w", err)
	}
	for i := range accounts.Items {
		o := &accounts.Items[i]
		remove("ServiceAccount", o, core.ServiceAccounts(o.Namespace).Delete)
	}
	return errors.Join(errs...)
}
