package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"
)

const (
	waypointClass    = "istio-waypoint"
	waypointPort     = 15008
	labelUseWaypoint = "istio.io/use-waypoint"
	labelWaypointFor = "istio.io/waypoint-for"
	labelMode        = "istio.io/dataplane-mode"
	labelRevision    = "istio.io/rev"
)

// waypointOptions are the flags of apply and generate.
type waypointOptions struct {
	name, trafficFor, revision string
	enroll, overwrite, wait    bool
	timeout                    time.Duration
}

func (s *session) waypoint() *cobra.Command {
	c := &cobra.Command{
		Use:   "waypoint",
		Args:  cobra.NoArgs, // a misspelt verb is an error
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
		Short: "Manage waypoints: the proxies that route and authorize HTTP",
		Example: `  # HTTP routing and policy for every service of a namespace
  fairlead waypoint apply -n shop --enroll-namespace --wait
  fairlead waypoint list -A`,
	}
	c.AddCommand(s.waypointApply(), s.waypointGenerate(), s.waypointList(), s.waypointStatus(), s.waypointDelete())
	return c
}

func (o *waypointOptions) flags(c *cobra.Command) {
	c.Flags().StringVar(&o.name, "name", "waypoint", "name of the waypoint")
	c.Flags().StringVar(&o.trafficFor, "for", "", "traffic it takes: service, workload, all or none (default: service)")
	c.Flags().StringVarP(&o.revision, "revision", "r", "", "control-plane revision")
}

// object is the Gateway that stands for a waypoint.
func (o *waypointOptions) object(namespace string) (*gatewayv1.Gateway, error) {
	labels := map[string]string{}
	switch o.trafficFor {
	case "":
	case "service", "workload", "all", "none":
		labels[labelWaypointFor] = o.trafficFor
	default:
		return nil, fmt.Errorf("--for %q: want service, workload, all or none", o.trafficFor)
	}
	if o.revision != "" {
		labels[labelRevision] = o.revision
	}
	return &gatewayv1.Gateway{
		TypeMeta:   metav1.TypeMeta{APIVersion: gatewayv1.GroupVersion.String(), Kind: "Gateway"},
		ObjectMeta: metav1.ObjectMeta{Name: o.name, Namespace: namespace, Labels: labels},
		Spec: gatewayv1.GatewaySpec{
			GatewayClassName: waypointClass,
			Listeners:        []gatewayv1.Listener{{Name: "mesh", Port: waypointPort, Protocol: "HBONE"}},
		},
	}, nil
}

func (s *session) waypointApply() *cobra.Command {
	var o waypointOptions
	c := &cobra.Command{
		Use:   "apply",
		Short: "Create or update a waypoint",
		Example: `  fairlead waypoint apply -n shop --enroll-namespace --wait
  fairlead waypoint apply -n shop --name for-workloads --for workload`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := s.connect()
			if err != nil {
				return err
			}
			return s.applyWaypoint(cmd.Context(), k, o)
		},
	}
	o.flags(c)
	c.Flags().BoolVar(&o.enroll, "enroll-namespace", false, "label the namespace to use the waypoint")
	c.Flags().BoolVar(&o.overwrite, "overwrite", false, "replace a label that names another waypoint")
	c.Flags().BoolVarP(&o.wait, "wait", "w", false, "wait until the waypoint is ready")
	c.Flags().DurationVar(&o.timeout, "timeout", 90*time.Second, "how long --wait waits")
	return c
}

func (s *session) applyWaypoint(ctx context.Context, k *clients, o waypointOptions) error {
	gw, err := o.object(k.namespace)
	if err != nil {
		return err
	}
	if o.enroll {
		// Looked at before anything is made, so that a refusal leaves nothing half done.
		if err := checkEnrolment(ctx, k, o); err != nil {
			return err
		}
	}
	body, err := yaml.Marshal(gw)
	if err != nil {
		return err
	}
	force := true
	_, err = k.gateway.GatewayV1().Gateways(k.namespace).Patch(ctx, o.name, types.ApplyPatchType, body,
		metav1.PatchOptions{FieldManager: "fairlead", Force: &force})
	if apierrors.IsNotFound(err) && strings.Contains(err.Error(), "resource") {
		return fmt.Errorf("apply waypoint %s/%s: the cluster does not know Gateways: install the Gateway API's CRDs: %w", k.namespace, o.name, err)
	}
	if err != nil {
		return fmt.Errorf("apply waypoint %s/%s: %w", k.namespace, o.name, err)
	}
	fmt.Fprintf(s.out, "waypoint %s/%s applied\n", k.namespace, o.name)
	if o.wait {
		if err := s.waitWaypoint(ctx, k, o); err != nil {
			return err
		}
	}
	if o.enroll {
		return s.enroll(ctx, k, o)
	}
	return nil
}

// checkEnrolment refuses to take a namespace away from another waypoint.
func checkEnrolment(ctx context.Context, k *clients, o waypointOptions) error {
	ns, err := k.kubernetes.CoreV1().Namespaces().Get(ctx, k.namespace, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look at namespace %s: %w", k.namespace, err)
	}
	if was := ns.Labels[labelUseWaypoint]; was != "" && was != o.name && !o.overwrite {
		return fmt.Errorf("namespace %s uses waypoint %q already: --overwrite replaces it", k.namespace, was)
	}
	return nil
}

func (s *session) enroll(ctx context.Context, k *clients, o waypointOptions) error {
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, labelUseWaypoint, o.name)
	ns, err := k.kubernetes.CoreV1().Namespaces().Patch(ctx, k.namespace, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "fairlead"})
	if err != nil {
		return fmt.Errorf("label namespace %s: %w", k.namespace, err)
	}
	fmt.Fprintf(s.out, "namespace %s uses waypoint %s\n", k.namespace, o.name)
	if ns.Labels[labelMode] != "ambient" {
		fmt.Fprintf(s.out, "warning: namespace %s is not in the mesh; `kubectl label namespace %s %s=ambient` puts it there\n", k.namespace, k.namespace, labelMode)
	}
	return nil
}

// waitWaypoint waits until the control plane reports the Gateway as programmed.
func (s *session) waitWaypoint(ctx context.Context, k *clients, o waypointOptions) error {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	last := "no status yet: is istiod running in " + s.system + "?"
	for {
		gw, err := k.gateway.GatewayV1().Gateways(k.namespace).Get(ctx, o.name, metav1.GetOptions{})
		if err == nil {
			c := meta.FindStatusCondition(gw.Status.Conditions, string(gatewayv1.GatewayConditionProgrammed))
			if c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == gw.Generation {
				fmt.Fprintf(s.out, "waypoint %s/%s is ready\n", k.namespace, o.name)
				return nil
			}
			if c != nil {
				last = c.Reason + ": " + c.Message
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waypoint %s/%s is not ready after %v: %s", k.namespace, o.name, o.timeout, last)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (s *session) waypointGenerate() *cobra.Command {
	var o waypointOptions
	c := &cobra.Command{
		Use:     "generate",
		Short:   "Print a waypoint's YAML without touching the cluster",
		Example: "  fairlead waypoint generate -n shop --for all > waypoint.yaml",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			gw, err := o.object(s.namespace)
			if err != nil {
				return err
			}
			b, err := yaml.Marshal(gw)
			if err != nil {
				return err
			}
			_, err = s.out.Write(b)
			return err
		},
	}
	o.flags(c)
	return c
}

// listWaypoints returns the Gateways of the waypoint class.
func listWaypoints(ctx context.Context, k *clients, namespace string) ([]gatewayv1.Gateway, error) {
	list, err := k.gateway.GatewayV1().Gateways(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list gateways: %w", err)
	}
	all := []gatewayv1.Gateway{}
	for _, gw := range list.Items {
		if gw.Spec.GatewayClassName == waypointClass {
			// A client takes the kind away, and who reads the output wants to know it.
			gw.TypeMeta = metav1.TypeMeta{APIVersion: gatewayv1.GroupVersion.String(), Kind: "Gateway"}
			all = append(all, gw)
		}
	}
	return all, nil
}

func programmed(gw *gatewayv1.Gateway) (status, message string) {
	c := meta.FindStatusCondition(gw.Status.Conditions, string(gatewayv1.GatewayConditionProgrammed))
	if c == nil {
		return "Unknown", "the control plane has not looked at it yet"
	}
	return string(c.Status), c.Message
}

func (s *session) waypointList() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:     "list",
		Short:   "List waypoints",
		Example: "  fairlead waypoint list -A\n  fairlead waypoint list -n shop -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := s.connect()
			if err != nil {
				return err
			}
			if all {
				k.namespace = metav1.NamespaceAll
			}
			list, err := listWaypoints(cmd.Context(), k, k.namespace)
			if err != nil {
				return err
			}
			t := table{header: []string{"NAMESPACE", "NAME", "REVISION", "TRAFFIC", "PROGRAMMED"}}
			for _, gw := range list {
				status, _ := programmed(&gw)
				traffic := gw.Labels[labelWaypointFor]
				if traffic == "" {
					traffic = "service"
				}
				t.rows = append(t.rows, []string{gw.Namespace, gw.Name, dash(gw.Labels[labelRevision]), traffic, status})
			}
			return s.print(list, t)
		},
	}
	s.outputFlag(c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of every namespace")
	return c
}

func (s *session) waypointStatus() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:     "status [NAME]",
		Short:   "Show whether waypoints are ready, and why not",
		Example: "  fairlead waypoint status -n shop\n  fairlead waypoint status -n shop waypoint",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := s.connect()
			if err != nil {
				return err
			}
			if all {
				k.namespace = metav1.NamespaceAll
			}
			list, err := listWaypoints(cmd.Context(), k, k.namespace)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				list = slices.DeleteFunc(list, func(gw gatewayv1.Gateway) bool { return gw.Name != args[0] })
				if len(list) == 0 {
					return fmt.Errorf("no waypoint %s/%s: `fairlead waypoint list -A` lists them", k.namespace, args[0])
				}
			}
			t := table{header: []string{"NAMESPACE", "NAME", "PROGRAMMED", "ADDRESS", "MESSAGE"}}
			for _, gw := range list {
				address := ""
				if len(gw.Status.Addresses) > 0 {
					address = gw.Status.Addresses[0].Value
				}
				status, message := programmed(&gw)
				t.rows = append(t.rows, []string{gw.Namespace, gw.Name, status, dash(address), message})
			}
			return s.print(list, t)
		},
	}
	s.outputFlag(c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of every namespace")
	return c
}

func (s *session) waypointDelete() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "delete [NAME...]",
		Short: "Delete waypoints, and the namespace's label that names them",
		Example: `  fairlead waypoint delete -n shop waypoint
  fairlead waypoint delete -n shop --all`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if all == (len(names) > 0) {
				return errors.New("say which waypoints, or --all for every one of the namespace")
			}
			k, err := s.connect()
			if err != nil {
				return err
			}
			if all {
				list, err := listWaypoints(cmd.Context(), k, k.namespace)
				if err != nil {
					return err
				}
				for _, gw := range list {
					names = append(names, gw.Name)
				}
			}
			for _, name := range names {
				if err := s.deleteWaypoint(cmd.Context(), k, name); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&all, "all", false, "every waypoint of the namespace")
	return c
}

// deleteWaypoint takes the label away first: services bound to a waypoint that is missing are closed.
func (s *session) deleteWaypoint(ctx context.Context, k *clients, name string) error {
	gateways := k.gateway.GatewayV1().Gateways(k.namespace)
	gw, err := gateways.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look at waypoint %s/%s: %w", k.namespace, name, err)
	}
	if gw.Spec.GatewayClassName != waypointClass {
		return fmt.Errorf("gateway %s/%s is of class %s, not a waypoint: delete it with kubectl if you mean it", k.namespace, name, gw.Spec.GatewayClassName)
	}
	ns, err := k.kubernetes.CoreV1().Namespaces().Get(ctx, k.namespace, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look at namespace %s: %w", k.namespace, err)
	}
	if ns.Labels[labelUseWaypoint] == name {
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:null}}}`, labelUseWaypoint)
		if _, err := k.kubernetes.CoreV1().Namespaces().Patch(ctx, k.namespace, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("remove the label of namespace %s: %w", k.namespace, err)
		}
		fmt.Fprintf(s.out, "namespace %s uses no waypoint\n", k.namespace)
	}
	if err := gateways.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("delete waypoint %s/%s: %w", k.namespace, name, err)
	}
	fmt.Fprintf(s.out, "waypoint %s/%s deleted\n", k.namespace, name)
	return nil
}
