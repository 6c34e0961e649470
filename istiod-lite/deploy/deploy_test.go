package deploy

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

func waypoint(name string) *gatewayv1.Gateway {
	return &gatewayv1.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: "gateway-uid", Generation: 3},
		Spec: gatewayv1.GatewaySpec{GatewayClassName: Class,
			Listeners:      []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: "HBONE"}},
			Infrastructure: &gatewayv1.GatewayInfrastructure{Labels: map[gatewayv1.LabelKey]gatewayv1.LabelValue{"team": "shop"}}},
	}
}

func config() Config {
	return Config{Image: "docker.io/fairlead/waypoint:dev", SystemNamespace: "istio-system", ClusterID: "Kubernetes", TrustDomain: "cluster.local"}
}

func TestEnsure(t *testing.T) {
	ctx := context.Background()
	client := fake.NewClientset()
	d := New(client, config())
	for range 2 {
		if err := d.Ensure(ctx, waypoint("gate")); err != nil {
			t.Fatal(err)
		}
	}
	dep, err := client.AppsV1().Deployments("shop").Get(ctx, "gate", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"gateway.istio.io/managed":                     "istio.io-mesh-controller",
		"gateway.networking.k8s.io/gateway-name":       "gate",
		"gateway.networking.k8s.io/gateway-class-name": "istio-waypoint",
		"app.kubernetes.io/managed-by":                 "fairlead",
		"team":                                         "shop",
	}
	if diff := cmp.Diff(want, dep.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	owners := []metav1.OwnerReference{{APIVersion: "gateway.networking.k8s.io/v1", Kind: "Gateway", Name: "gate", UID: "gateway-uid"}}
	if diff := cmp.Diff(owners, dep.OwnerReferences); diff != "" {
		t.Errorf("owners (-want +got):\n%s", diff)
	}
	pod := dep.Spec.Template
	if got := pod.Labels["istio.io/dataplane-mode"]; got != "none" {
		t.Errorf("dataplane-mode of the pod = %q, want none: its own connections would be captured", got)
	}
	if dep.Spec.Replicas != nil {
		t.Errorf("replicas = %d, want none: they are the user's", *dep.Spec.Replicas)
	}
	token := pod.Spec.Volumes[1].Projected.Sources[0].ServiceAccountToken
	if token.Audience != "istio-ca" {
		t.Errorf("token audience = %q", token.Audience)
	}
	svc, err := client.CoreV1().Services("shop").Get(ctx, "gate", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var ports []int32
	for _, p := range svc.Spec.Ports {
		ports = append(ports, p.Port)
	}
	if diff := cmp.Diff([]int32{15021, 15008}, ports); diff != "" {
		t.Errorf("service ports (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{"gateway.networking.k8s.io/gateway-name": "gate"}, svc.Spec.Selector); diff != "" {
		t.Errorf("selector (-want +got):\n%s", diff)
	}
	if _, err := client.CoreV1().ServiceAccounts("shop").Get(ctx, "gate", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}

func TestEnsureLeavesOthersAlone(t *testing.T) {
	ctx := context.Background()
	client := fake.NewClientset(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "gate"}})
	err := New(client, config()).Ensure(ctx, waypoint("gate"))
	if err == nil || !strings.Contains(err.Error(), "Service shop/gate exists and is not a waypoint's") {
		t.Errorf("error = %v", err)
	}
	if _, err := client.AppsV1().Deployments("shop").Get(ctx, "gate", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a deployment was made beside a foreign service: %v", err)
	}
}

func TestPrune(t *testing.T) {
	ctx := context.Background()
	client := fake.NewClientset(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}})
	d := New(client, config())
	for _, name := range []string{"gate", "other"} {
		if err := d.Ensure(ctx, waypoint(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Prune(ctx, []*gatewayv1.Gateway{waypoint("other")}); err != nil {
		t.Fatal(err)
	}
	var left []string
	services, err := client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range services.Items {
		left = append(left, "Service "+s.Name)
	}
	deployments, err := client.AppsV1().Deployments("").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range deployments.Items {
		left = append(left, "Deployment "+o.Name)
	}
	accounts, err := client.CoreV1().ServiceAccounts("").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range accounts.Items {
		left = append(left, "ServiceAccount "+o.Name)
	}
	want := []string{"Service other", "Service web", "Deployment other", "ServiceAccount other"}
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("left after prune (-want +got):\n%s", diff)
	}
}

func TestStatus(t *testing.T) {
	svc := &corev1.Service{Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.9", "fd00::9"}}}
	ready := &appsv1.Deployment{Status: appsv1.DeploymentStatus{ReadyReplicas: 1}}
	for _, tc := range []struct {
		name   string
		svc    *corev1.Service
		dep    *appsv1.Deployment
		status metav1.ConditionStatus
		reason string
		ips    int
	}{
		{"nothing yet", nil, nil, metav1.ConditionFalse, "AddressNotAssigned", 0},
		{"headless", &corev1.Service{Spec: corev1.ServiceSpec{ClusterIP: "None"}}, ready, metav1.ConditionFalse, "AddressNotAssigned", 0},
		{"no pod", svc, &appsv1.Deployment{}, metav1.ConditionFalse, "Pending", 2},
		{"ready", svc, ready, metav1.ConditionTrue, "Programmed", 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := Status(waypoint("gate"), tc.svc, tc.dep, metav1.Now())
			for _, c := range s.Conditions {
				if c.Type == "Programmed" && (c.Status != tc.status || c.Reason != tc.reason || c.ObservedGeneration != 3) {
					t.Errorf("Programmed = %s %s (generation %d), want %s %s", c.Status, c.Reason, c.ObservedGeneration, tc.status, tc.reason)
				}
			}
			if len(s.Addresses) != tc.ips {
				t.Errorf("%d addresses, want %d", len(s.Addresses), tc.ips)
			}
		})
	}
}

func TestStatusKeepsTransitionTimes(t *testing.T) {
	gw := waypoint("gate")
	then, now := metav1.NewTime(time.Unix(1000, 0)), metav1.NewTime(time.Unix(2000, 0))
	gw.Status = Status(gw, nil, nil, then)
	again := Status(gw, nil, nil, now)
	if diff := cmp.Diff(gw.Status, again); diff != "" {
		t.Errorf("status of an unchanged waypoint changed (-before +after):\n%s", diff)
	}
}
